"""Plot the benchmark's JSON files: `python -m tests.bench.plots DIR` writes a PNG beside each. Needs matplotlib."""
from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def grouped(rows: list[dict], *names: str) -> dict:
    """The rows that have a time, grouped by the values of some columns."""
    groups = defaultdict(list)
    for row in rows:
        if "ms" in row:
            groups[tuple(row[name] for name in names)].append(row)
    return groups


def panels(count: int, width: float = 6.0, height: float = 4.5):
    """A figure with its axes in at most three columns."""
    columns = min(3, count)
    figure, axes = plt.subplots(-(-count // columns), columns, squeeze=False,
                                figsize=(width * columns, height * -(-count // columns) + 0.6))
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, axes.flat


def cases(rows: list[dict]):
    """Bars: device time by method, a panel a case, with L1 beside each bar."""
    groups = grouped(rows, "case")
    figure, axes = panels(len(groups), height=5.5)
    for ax, ((case,), found) in zip(axes, groups.items(), strict=False):
        colours = ["tab:green" if row["method"].startswith("ours") else "tab:gray" for row in found]
        bars = ax.barh([row["method"] for row in found], [row["ms"] for row in found], color=colours)
        ax.bar_label(bars, [f"{row['ms']:.2f} (L1 {row['L1']:.3f})" for row in found], fontsize=7, padding=2)
        ax.set(title=case, xlabel="device time, ms")
        ax.margins(x=0.3)
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=8)
    return figure


def sparsity(rows: list[dict]):
    """Lines: device time against the sparsity of a given map, a panel a case."""
    groups = grouped(rows, "case")
    figure, axes = panels(len(groups))
    for ax, ((case,), found) in zip(axes, groups.items(), strict=False):
        for (method,), line in grouped(found, "method").items():
            if len(line) == 1:
                ax.axhline(line[0]["ms"], color="tab:gray", linestyle="--", label=method)
            else:
                ax.plot([row["sparsity"] for row in line], [row["ms"] for row in line], marker="o", label=method)
        ax.set(title=case, xlabel="sparsity of the map", ylabel="device time, ms", ylim=(0, None))
        ax.legend()
    return figure


def curves(rows: list[dict], column: str, label: str):
    """Lines on logarithmic axes: device time against one column, by method and share."""
    figure, axes = panels(1, 9, 6)
    for row in rows:
        row["line"] = row["method"] + (f" topk {row['topk']}" if "topk" in row else "")
    for (name,), line in grouped(rows, "line").items():
        style = "--" if name.startswith("SDPA") else "-"
        axes[0].plot([row[column] for row in line], [row["ms"] for row in line], style, marker="o", label=name)
    ticks = sorted({row[column] for row in rows})
    axes[0].set(xscale="log", yscale="log", xlabel=label, ylabel="device time, ms")
    axes[0].set_xticks(ticks, [f"{tick // 1024}K" if tick >= 1024 else str(tick) for tick in ticks])
    axes[0].minorticks_off()
    axes[0].legend()
    axes[0].grid(alpha=0.3)
    return figure


def errors(rows: list[dict]):
    """Points: error against device time, all seeds, a panel a case; stars are the fastest with L1 ≤ 0.05."""
    groups = grouped([row | dict(series=_series(row["method"])) for row in rows if "L1" in row], "case")
    figure, axes = panels(len(groups))
    for ax, ((case,), found) in zip(axes, groups.items(), strict=False):
        for (series,), points in grouped(found, "series").items():
            ax.scatter([row["ms"] for row in points], [row["L1"] for row in points], s=14, label=series)
        for best in (row for row in found if row.get("best")):
            ax.scatter(best["ms"], best["L1"], marker="*", s=120, facecolor="none", edgecolor="black", zorder=3)
        ax.axhline(0.05, color="tab:red", linewidth=0.8)
        ax.set(title=case, xlabel="device time, ms", ylabel="relative L1", yscale="log")
        ax.legend(fontsize=7)
    return figure


def _series(method: str) -> str:
    """The methods whose points have one colour: all settings of a peer, ours by format and tail."""
    if method.startswith("ours"):
        return " ".join(method.split()[:2]) + (", pooled" if method.endswith(", pooled") else "")
    return method.split()[0] if method.startswith(("sol_attn", "SpargeAttn")) else method


def tuning(rows: list[dict]):
    """Points: PSNR of whole clips against the time of a call; tuned settings are joined by a line."""
    figure, axes = panels(1, 9, 6)
    found = [row for row in rows if "psnr_db" in row]
    for name, style in (("fixed", dict(linestyle="", color="tab:gray")), ("tuned", dict(color="tab:green"))):
        points = sorted((row for row in found if row["kind"] == name), key=lambda row: row["call_ms"])
        axes[0].plot([row["call_ms"] for row in points], [row["psnr_db"] for row in points], marker="o", label=name,
                     **style)
    for row in found:
        axes[0].annotate(row["setting"], (row["call_ms"], row["psnr_db"]), textcoords="offset points", fontsize=8,
                         **(dict(xytext=(-6, 5), ha="right") if row["kind"] == "tuned" else dict(xytext=(6, -9))))
    axes[0].set(xlabel="device time of a call, ms", ylabel="PSNR against dense, dB")
    axes[0].margins(x=0.15)
    axes[0].legend()
    axes[0].grid(alpha=0.3)
    return figure


def residuals(rows: list[dict]):
    """Lines: PSNR of whole runs against the time of their attention, with and without refreshes, a panel for each
    number of steps."""
    numbers = sorted({row["steps"] for row in rows})
    figure, axes = panels(len(numbers), width=7.0, height=6.0)
    for ax, steps in zip(axes, numbers, strict=False):
        timed = [row for row in rows if row["steps"] == steps and row["attention"]]
        lines = defaultdict(list)  # of points (speed, PSNR, note)
        for row in timed:
            label, note = _line_and_note(row)
            lines[label].append((1 / row["attention"], row["psnr_mean"], note))
        for label, points in sorted(lines.items()):
            points.sort()
            ax.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=label,
                    linestyle="--" if "no refreshes" in label else "-")
            for x, y, note in points:
                ax.annotate(note, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        seeds = " or ".join(map(str, sorted({len(row["seeds"]) for row in timed})))
        ax.set(title=f"{steps} steps; seeds: {seeds}", xlabel="speed of a run's attention, dense = 1",
               ylabel="PSNR against dense, mean of six clips a seed, dB")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    return figure


def _line_and_note(row: dict) -> tuple[str, str]:
    """Which line a row of the refreshes belongs to, and what stands beside its point."""
    dense = f"dense steps of τ {row['dense_cdf']:g}"
    refreshes = f"{len(row['refreshed'])} refreshes" if row["refreshed"] else "no refreshes"
    if row["l1"]:
        return f"tuned, {refreshes}, {dense}", f"L1 {row['l1']:g}"
    (name, value), = row["amount"].items()
    if name == "cdf_threshold":
        return f"{refreshes}, {dense}", f"τ {value:g}"
    return f"top {100 * value:g}%, {dense}", str(len(row["refreshed"]))


def real(rows: list[dict]):
    """Lines: median error of a head against the share kept, in the model's own order, a panel a source."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    figure, axes = panels(len(sources))
    for ax, source in zip(axes, sources, strict=False):
        found = [row for row in rows if row["source"] == source and row["order"] == "row-major"]
        names = list(dict.fromkeys(row["setting"] for row in found))
        for row in found:
            pooled, single = row["tail"] == "pooled", len(row["kept"]) == 1
            if single and pooled:
                continue
            label = row["setting"] + (f", τ {row['amounts'][0]:g}" if single else f", {row['tail']}")
            ax.plot(row["kept"], row["l1_median"], color="black" if single else f"C{names.index(row['setting'])}",
                    linestyle="--" if pooled else "-", marker="*" if single else ".", markersize=12 if single else 5,
                    label=label)
        for bound in (0.05, 0.1):
            ax.axhline(bound, color="tab:red", linewidth=0.8)
        ax.set(title=source, xlabel="share of the blocks kept", ylabel="relative L1, median", yscale="log", xlim=(0, 1),
               ylim=(1e-3, 1))
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return figure


DRAW = {"cases": cases, "sparsity": sparsity, "error": errors, "tuning": tuning, "residuals": residuals, "real": real,
        "length": lambda rows: curves([row for row in rows if row.get("heads", 12) == 12], "n", "tokens"),
        "head_dim": lambda rows: curves(rows, "head_dim", "head_dim")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the benchmarks' JSON files")
    folder = parser.parse_args().folder
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if report.get("mode") not in DRAW:
            continue
        figure = DRAW[report["mode"]](report["rows"])
        figure.suptitle(f"{report['mode']}: {report['card']}, torch {report['torch']}"
                        + (f", Triton {report['triton']}" if "triton" in report else ", exact arithmetic"))
        figure.tight_layout()
        figure.savefig(path.with_suffix(".png"), dpi=110)
        plt.close(figure)
        print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
