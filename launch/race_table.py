"""The tables of `launch/benchmark.py inference` for a terminal."""

from __future__ import annotations

from typing import Any


def describe_point(table: dict[str, Any]) -> str:
    """What a table was measured at, in a line."""
    sizes = table["codebook_size"]
    return (
        f"backbone {table['backbone_parameters'] / 1e6:,.1f} M parameters, K={table['compression_factor']}, "
        f"D={table['codebook_levels']}, C={sizes if isinstance(sizes, int) else list(sizes)}, "
        f"spatial {table['spatial'][0]} x {table['spatial'][1]}, depth {table['depth'][0]} x {table['depth'][1]}; "
        f"batch {table['batch_size']}, {table['prompt_tokens']} tokens of prompt, {table['kept_tokens']} kept, "
        f"{table['repeats']} repeats"
    )


def print_run(result: dict[str, Any]) -> None:
    """Everything, for a person."""
    environment = result["environment"]
    print(
        f"{result['dtype']}, {result['threads']} threads, torch {environment['torch']}, transformers "
        f"{environment['transformers']}, {environment['processor']}"
        + "".join(f", {name}" for name in environment["accelerators"])
    )
    print(result["note"])
    for table in result["tables"]:
        print_table(table)


def print_table(table: dict[str, Any]) -> None:
    """One table."""
    machine = table["machine"]
    if table.get("axis"):
        print(f"\n{table['axis']} = {table['value']}: {describe_point(table)}")
    else:
        print(f"\n{describe_point(table)}")
    print(
        f"{'':42}{'tokens/s':>9}{'ms/token':>9}{'spread':>8}{'speed-up':>9}{'first, ms':>10}"
        f"{'GB':>7}{'peak +MB':>9}{'KV B/tok':>10}{'agree':>7}{'predicted':>10}{'ratio':>6}"
    )
    for row in table["rows"]:
        agree = "" if row.get("agreement") is None else f"{100 * row['agreement']:.0f} %"
        speedup = row["speedup_over_fastest_ar"]
        predicted, ratio = row["predicted_ms_per_token"], row["predicted_over_measured"]
        growth = row.get("peak_growth_bytes")
        print(
            f"{row['name']:42}{row['tokens_per_s']:9.1f}{row['ms_per_token']:9.2f}{row['spread_ms_per_token']:8.2f}"
            f"{'' if speedup is None else f'{speedup:.2f}x':>9}{row['first_text_ms']:10.1f}"
            f"{row['weight_bytes'] / 1e9:7.2f}{'' if growth is None else f'{growth / 1e6:.0f}':>9}"
            f"{row['kv_bytes_per_token']:10,.0f}{agree:>7}"
            f"{'' if predicted is None else f'{predicted:.2f}':>10}{'' if ratio is None else f'{ratio:.2f}':>6}"
        )
    for row in table["missing"]:
        print(f"{row['name']:42}  not run: {row['reason']}")
    for row in table["rows"]:
        if row.get("split_ms_per_token"):
            split, wanted = row["split_ms_per_token"], row.get("predicted_split_ms_per_token", {})
            parts = ", ".join(
                f"{part} {ms:.2f}" + (f" ({wanted[part]:.2f})" if part in wanted else "")
                for part, ms in split.items()
            )
            print(
                f"{row['name']}: ms per token (predicted) {parts}; {100 * row['overhead_share']:.1f} % beyond them"
            )
    print(
        f"speed-up over {table['fastest_ar'] or 'nothing: no autoregressive row'}; KV bytes per token: "
        f"{table['ar_kv_bytes_per_token']:,.0f} autoregressive, of which 1/K would be "
        f"{table['ar_kv_bytes_over_compression_factor']:,.0f} at equal width; a streaming decoder keeps its own too"
    )
    print(
        f"machine, mean of before and after: {machine['bandwidth_gb_s']:.1f} GB/s of weights, "
        f"{machine['matmul_gflops']:,.0f} GFLOP/s of products, {machine['launch_us']:.1f} us per operation"
    )
