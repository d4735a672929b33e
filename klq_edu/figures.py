"""Every plot, defined once: report, notebooks and slides draw the same one.

Each function returns a Picture: a matplotlib figure, a caption that says what to see, and a text alternative. Colours
are Okabe and Ito's, distinguishable to everyone; line styles differ as well.
"""

from itertools import cycle
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, FigureBase

from klq_edu.core.improvement import action_values, kl_penalised_argmax, klq_step, penalty_coefficient, ppo_penalty_step
from klq_edu.core.tree import TokenTree

GREY, BLUE, ORANGE, GREEN, PINK, AMBER = "#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
SKY = "#56B4E9"
DASHES = (0, (5, 1, 1, 1))
STYLES = {  # of an algorithm's line
    "klq": {"label": "KLQ", "color": BLUE, "linestyle": "-"},
    "ppo_clip": {"label": "PPO-clip", "color": ORANGE, "linestyle": "--"},
    "ppo_clip_whitened": {"label": "PPO-clip, whitened", "color": PINK, "linestyle": DASHES},
    "ppo_penalty": {"label": "PPO-penalty", "color": GREEN, "linestyle": ":"},
    "klq_whitened": {"label": "KLQ, whitened", "color": SKY, "linestyle": DASHES},
    "ppo_penalty_whitened": {"label": "PPO-penalty, whitened", "color": AMBER, "linestyle": DASHES},
}
CONTENDERS = {  # of the benchmark: colour, line, marker, hatch
    "naive": (ORANGE, "--", "s", "//"),
    "naive, compiled": (AMBER, DASHES, "D", "\\\\"),
    "ours (torch)": (BLUE, "-", "o", ""),
    "ours (triton)": (GREEN, "-.", "^", "--"),
    "F.linear_cross_entropy": (PINK, (0, (1, 1)), "v", "xx"),
}


class Picture(NamedTuple):
    """A figure, the sentence that says what to see in it, and what it shows in words."""

    figure: Figure
    caption: str
    alt: str


def learning_curves(runs: pd.DataFrame, columns: dict[str, str], remark: str, smooth: int = 1) -> Picture:
    """One panel per column of `runs` (name -> axis label) against the number of rollouts, one line per algorithm.

    `runs` holds the rows of all runs with columns "algorithm", "seed" and "rollouts"; `remark` ends the caption and
    says what to see. Lines are medians over seeds of running means over `smooth` updates, bands their whole range.
    """
    figure, axes = panels(len(columns))
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        for name, part in in_order(runs, "algorithm", STYLES):
            table = part.pivot(index="rollouts", columns="seed", values=column).dropna()
            table, style = table.rolling(smooth, min_periods=1).mean(), STYLES[name]
            marker = "o" if len(table) < 30 else ""
            axis.plot(table.index, table.median(axis=1), marker=marker, ms=3, lw=1.8, **style)
            axis.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=style["color"], alpha=0.15, lw=0)
        axis.set(xlabel="completions sampled", ylabel=label)
    axes[0].legend()
    seeds = runs["seed"].nunique()
    spread = f"median of {seeds} seeds, bands from lowest to highest" if seeds > 1 else "one seed, so no error bars"
    averaged = f"; running mean over {smooth} updates" if smooth > 1 else ""
    names = " and ".join(columns.values())
    caption = f"{names} against the number of completions sampled ({spread}{averaged}). {remark}"
    return Picture(figure, caption[0].upper() + caption[1:], f"Line plots of {names} for {_names(runs)}.")


def reward_kl_plane(runs: pd.DataFrame, frontier: pd.DataFrame | None = None, smooth: int = 1) -> Picture:
    """Where each run travels in the plane of KL (price) and reward (gain); `frontier` adds the best possible trade.

    `frontier` has columns "kl" and "reward": the optimum for many τ. With it the runs' exact values are drawn
    ("exact_kl", "exact_reward"), without it the batches' means.
    """
    figure, (axis,) = panels(1)
    x, y, exact = "kl", "reward", ""
    if frontier is not None:
        x, y = "exact_kl", "exact_reward"
        exact = " Both are exact, by enumeration: no policy can be above the grey line."
        axis.plot(frontier["kl"], frontier["reward"], color=GREY, lw=1, label="best possible (exact, all τ)")
    for name, part in in_order(runs, "algorithm", STYLES):
        for i, (_, run) in enumerate(part.groupby("seed")):
            path = run[[x, y]].dropna().rolling(smooth, min_periods=1).mean()
            style = STYLES[name] | ({} if i == 0 else {"label": None})
            axis.plot(path[x], path[y], alpha=0.7, lw=1.8, **style)
            axis.plot(path[x].iloc[-1], path[y].iloc[-1], "o", color=style["color"])
    axis.set(xlabel="KL(π ‖ reference) per completion [nats]", ylabel="reward per completion")
    axis.legend(loc="lower right")
    caption = (
        "Reward gained against KL paid, one path per run from the reference (left) to its end (dot). Higher at the "
        f"same KL is better; further right at the same height is waste.{exact}"
    )
    return Picture(figure, caption, f"Paths in the KL-reward plane for {_names(runs)}.")


def optimum_curves(runs: pd.DataFrame, tau: float) -> Picture:
    """Exact KL(π ‖ π*) on a logarithmic axis against rollouts (worlds that can be enumerated)."""
    remark = (
        f"This is the distance to the exact optimum at τ = {tau:g}, (J* − J)/τ, computed by enumerating every "
        "completion: no sampling noise is left in these curves but that of training itself. Lower is better."
    )
    picture = learning_curves(runs, {"kl_optimum": "KL(π ‖ π*) per completion [nats]"}, remark)
    picture.figure.axes[0].set_yscale("log")
    return picture._replace(alt=f"{picture.alt[:-1]}, on a logarithmic axis.")


def optimum_gaps(runs: pd.DataFrame, labels: dict[str, str]) -> Picture:
    """KL(π ‖ π*) at the end of each run against τ, by algorithm: one panel per schedule (name -> title) of a sweep."""
    figure, axes = panels(len(labels), width=4.2, height=3.8)
    taus = sorted(runs["tau"].unique())
    for axis, (schedule, title) in zip(axes, labels.items(), strict=True):
        for i, (name, part) in enumerate(in_order(runs[runs["schedule"] == schedule], "algorithm", STYLES)):
            gaps = part.groupby("tau")["kl_optimum"]
            places = [taus.index(tau) + 0.16 * (i - 1.5) for tau in gaps.median().index]
            spread = [gaps.median() - gaps.min(), gaps.max() - gaps.median()]
            look = {"color": STYLES[name]["color"], "label": STYLES[name]["label"], "marker": "osD^"[i]}
            axis.errorbar(places, gaps.median(), spread, ls="", ms=5, lw=1.2, **look)
        axis.set(xlabel="KL coefficient τ", ylabel="KL(π ‖ π*) [nats]", title=title, yscale="log")
        axis.set_xticks(range(len(taus)), [f"{tau:g}" for tau in taus])
    low, high = (f(axis.get_ylim()[i] for axis in axes) for i, f in enumerate((min, max)))
    for axis in axes:
        axis.set_ylim(low, high)
    axes[-1].legend()
    seeds, completions = runs["seed"].nunique(), runs["rollouts"].max()
    caption = (
        f"Exact distance to the optimum after {completions:,} completions, used in {len(labels)} ways; medians of "
        f"{seeds} seeds, bars from lowest to highest. Lower is better, and a step of the axis is a factor."
    )
    return Picture(figure, caption, f"Distance to the optimum against τ for {_names(runs)}, by use of completions.")


def calibration(pairs: pd.DataFrame, bins: int = 6) -> Picture:
    """How often a reward model agrees with held-out labels, by how sure it is. `pairs` has a column "proxy": its reward
    of the chosen completion less that of the rejected one."""
    figure, (axis,) = panels(1, width=4.6)
    sure, agrees = 1 / (1 + np.exp(-pairs["proxy"].abs())), pairs["proxy"] > 0
    groups = pd.qcut(sure, bins, labels=False, duplicates="drop")
    share, count = agrees.groupby(groups).mean(), agrees.groupby(groups).size()
    error = 1.96 * (share * (1 - share) / count) ** 0.5
    axis.plot([0.5, 1], [0.5, 1], color=GREY, lw=1, zorder=0, label="calibrated")
    axis.errorbar(sure.groupby(groups).mean(), share, error, color=BLUE, marker="o", ls="", label="reward model")
    axis.set(xlabel="how sure it is, σ(|difference of rewards|)", ylabel="share of labels it agrees with")
    axis.legend(loc="lower right")
    caption = (
        f"The reward model on {len(pairs)} pairs of prompts it was not fitted to, in {share.size} equal groups; "
        "bars are 95 % intervals, as if pairs were independent. On the line it is as often right as it says; below "
        "it is too sure of itself."
    )
    return Picture(figure, caption, "Agreement with held-out labels against the reward model's confidence.")


def win_rates(verdicts: pd.DataFrame) -> Picture:
    """Win-rates with their intervals, a row per comparison, a colour and mark per judge; `verdicts` as
    `comparison.verdicts` returns them."""
    pairs, judges = (list(dict.fromkeys(x)) for x in (verdicts["a"] + " against " + verdicts["b"], verdicts["judge"]))
    figure, (axis,) = panels(1, width=7.0, height=1.2 + 0.25 * len(pairs) * (len(judges) + 1))
    for i, (colour, marker, judge) in enumerate(zip(cycle((AMBER, BLUE, GREEN, PINK)), cycle("osD^v"), judges)):
        part, rows = verdicts[verdicts["judge"] == judge], np.arange(len(pairs)) + (i + 1) / (len(judges) + 1) - 0.5
        reach = [part["rate"] - part["low"], part["high"] - part["rate"]]
        axis.errorbar(part["rate"], rows, xerr=reach, color=colour, marker=marker, ls="", label=judge)
    axis.axvline(0.5, color=GREY, lw=1)
    axis.set_yticks(range(len(pairs)), pairs)
    axis.invert_yaxis()
    axis.set(xlabel="win-rate of the first (ties count half)", ylabel="comparison")
    axis.legend(title="judge", loc="lower right", bbox_to_anchor=(1, 1), ncols=len(judges), frameon=False)
    caption = (
        "How often completions of the first beat those of the second after the same held-out prompt, with 95 % "
        "intervals (of one seed: over prompts only). An interval that holds ½ shows no difference."
    )
    return Picture(figure, caption, f"Win-rates with intervals before {', '.join(judges)}.")


def gains_along_kl(tests: pd.DataFrame) -> Picture:
    """How much reward and each judge gave more than to the reference, against the KL paid: a panel each, a line per
    algorithm and setting through the tests along training (means over seeds), a small mark for the end of each run.

    `tests` has columns "algorithm", "setting" (τ), "seed", "update", "kl", and one per reward or judge.
    """
    judges = [c for c in tests if c not in ("algorithm", "setting", "seed", "update", "kl")]
    figure, axes = panels(len(judges), width=3.6, height=3.6)
    markers = dict(zip(tests["setting"].unique(), "osD^v" * 9))
    for axis, judge in zip(axes, judges, strict=True):
        for name, part in in_order(tests, "algorithm", STYLES):
            for setting, runs in part.groupby("setting", sort=False):
                ends, path = runs[runs["update"] == runs["update"].max()], runs.groupby("update")[["kl", judge]].mean()
                label = f"{STYLES[name]['label']}, τ = {setting}"
                look = {"marker": markers[setting], "color": STYLES[name]["color"]}
                axis.plot(
                    path["kl"], path[judge], lw=1.8, ms=7, markevery=[-1], **STYLES[name] | look | {"label": label}
                )
                axis.plot(ends["kl"], ends[judge], ls="", ms=4, alpha=0.45, **look)
        axis.axhline(0, color=GREY, lw=1)
        axis.set(
            xlabel="KL(π ‖ reference) [nats]", ylabel=f"gain before {judge}" if judge != "reward" else "gain in reward"
        )
    for tau in sorted({float(setting.split(",")[0]) for setting in tests["setting"]}):
        axes[0].plot(
            [0, tests["kl"].max()], [0, tau * tests["kl"].max()], color=GREY, lw=1, label=f"the price, {tau:g} KL"
        )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    seeds = tests["seed"].nunique()
    caption = (
        "Scores of held-out completions less the reference's, in each judge's own unit, against the KL paid. On the "
        "left the gain in reward; the sloped line is its price, τ KL: below it the objective J = reward − τ KL is less "
        "than the reference's. What rises there and nowhere else may be the reward model's mistakes, or what the "
        "judges do not see."
    )
    caption += f" Lines are means over {seeds} seeds, small marks the ends of single runs." if seeds > 1 else ""
    return Picture(figure, caption, f"Gains against KL before {', '.join(judges)} for {_names(tests)}.")


def exact_steps() -> Picture:
    """The exact KLQ step against the exact PPO-penalty step for several α at τ = 1; right: with β on the bare Δ."""
    tau, tree, old = 1.0, TokenTree.random(4, 3, seed=0), TokenTree.random(4, 3, seed=1).ref
    q, values = tree.evaluate(old, tau)
    advantages = q - action_values(old, values, tree.ref, tau)
    figure, axes = panels(2, height=3.6)
    for alpha, colour, marker in ((0.2, BLUE, "o"), (0.5, AMBER, "s"), (0.8, GREEN, "^")):
        beta = penalty_coefficient(tau, alpha)
        new, _ = klq_step(old, values, advantages, tree.ref, tau, alpha)
        right = ppo_penalty_step(old, q, tree.ref, tau, beta)
        wrong, _ = kl_penalised_argmax(advantages, (old, beta))
        look = {"color": colour, "ms": 4, "alpha": 0.8, "label": f"α = {alpha}"}
        for axis, other in zip(axes, (right, wrong), strict=True):
            axis.plot(new.log10().ravel(), other.log10().ravel(), marker, **look)
    titles = ("Q + Δ, penalties τ and β: the same step", "bare advantage, penalty β: not the same")
    for axis, title in zip(axes, titles, strict=True):
        low = min(axis.get_xlim())
        axis.plot([low, 0], [low, 0], color=GREY, lw=1, zorder=0)
        axis.set(xlabel="log₁₀ π(a|s) after the KLQ step", ylabel="log₁₀ π(a|s) after the PPO step", title=title)
    axes[0].legend()
    caption = (
        f"What theory predicts: each dot is one token in one state of a random token tree ({tree.ref.numel()} in all). "
        "With β = τ(1−α)/α beside τ, the exact PPO-penalty step and the exact KLQ step give the same policy, so the "
        "dots lie on the diagonal; put β on the bare advantage and they leave it."
    )
    return Picture(figure, caption, "Scatter plots of policies after both steps; left on the diagonal, right off it.")


def frontier(tree: TokenTree) -> pd.DataFrame:
    """Exact (kl, reward) of the optimum for a range of τ: the best possible trade between the two."""
    policies = [tree.optimum(tau)[2] for tau in np.geomspace(0.02, 50, 40).tolist()]
    points = [(tree.sequence_kl(p).item(), tree.expected_reward(p).item()) for p in policies]
    return pd.DataFrame(points, columns=["kl", "reward"])


def bench_times(rows: pd.DataFrame) -> Picture:
    """Bars: each contender's time in GEMM units beside the least it needs, at each workload's first size.

    `rows` are those of the benchmark's CSV with stage "both", in its order.
    """
    first = rows.groupby("workload", sort=False)[["n", "v", "h", "dtype"]].transform("first")
    rows = rows[(rows[first.columns] == first).all(axis=1)].iloc[::-1].reset_index()
    places = rows.index + 0.6 * (rows["workload"] != rows["workload"].shift()).cumsum()
    figure, (axis,) = panels(1, width=7.4, height=1.2 + 0.3 * len(rows))
    for place, row in zip(places, rows.itertuples(), strict=True):
        colour, _, _, hatch = CONTENDERS[row.contender]
        spread = [[row.units - row.units_low], [row.units_high - row.units]]
        axis.barh(place, row.units, xerr=spread, color=colour, hatch=hatch, edgecolor="white", ecolor=GREY)
    least = rows["limit"].notna()
    axis.plot(rows["limit"][least], places[least], "|", color="black", ms=14, mew=2.5, label="limit: products needed")
    axis.set_yticks(places, [f"{r.workload}: {r.contender}" for r in rows.itertuples()])
    axis.set(xlabel="time of forward and backward pass [N×H×V matrix products]", ylabel="workload: contender")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    caption = (
        "Time in units of one matrix product of the same shape, taken just before and after, so that a slow machine "
        "cannot lie. The black mark counts the products that cannot be avoided; the rest of a bar is overhead. Medians "
        "of the repetitions, whiskers from lowest to highest."
    )
    return Picture(figure, caption, f"Bars of time per contender for {', '.join(dict.fromkeys(rows['workload']))}.")


def bench_scaling(rows: pd.DataFrame, along: str) -> Picture:
    """Time, peak memory and gradient error of one workload against V (`along` = "v") or N ("n"), by contender."""
    shown = {"units": "time [N×H×V products]", "memory_mb": "peak memory beyond inputs [MB]"}
    shown |= {"error_gradient": "relative error of the gradient"}
    figure, axes = panels(3, width=3.9, height=3.6)
    ticks = sorted(rows[along].unique())
    for axis, (column, label) in zip(axes, shown.items(), strict=True):
        for name, part in in_order(rows.sort_values(along), "contender", CONTENDERS):
            colour, line, marker, _ = CONTENDERS[name]
            axis.plot(part[along], part[column], color=colour, linestyle=line, marker=marker, label=name)
            if column == "units":
                axis.vlines(part[along], part["units_low"], part["units_high"], color=colour, lw=1)
        axis.set(xlabel={"v": "vocabulary V", "n": "tokens N"}[along], ylabel=label, xscale="log")
        axis.set_xticks(ticks, [f"{x:,.0f}" for x in ticks], minor=False)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
    axes[0].legend()
    first, axis = rows.iloc[0], along.upper()
    fixed = f"N = {first['n']:,}" if along == "v" else f"V = {first['v']:,.0f}"
    caption = (
        f"{first['workload']} against {axis}, forward and backward, {fixed}, {first['dtype']}. Naive memory grows with "
        "N·V; the fused ways hold a fixed workspace, and beyond it only the gradients. A flat line on the left means "
        "that time grows like the products themselves (whiskers: lowest and highest repetition)."
    )
    return Picture(figure, caption, f"Time, memory and error of {first['workload']} against {axis}, by contender.")


def panels(count: int, width: float | None = None, height: float = 3.4):
    """A figure with `count` plain panels side by side, each so many inches wide."""
    figure = Figure(figsize=((width or (6.2 if count == 1 else 4.6)) * count, height), layout="constrained")
    return figure, plain_axes(figure, count)


def plain_axes(figure: FigureBase, count: int = 1):
    """`count` axes side by side on a figure (or part of one), with a light grid and no frame."""
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return axes


def in_order(rows: pd.DataFrame, column: str, names: dict):
    """(name, its rows) for those of `names` that occur, so that legends never depend on the data's order."""
    return [(name, rows[rows[column] == name]) for name in names if (rows[column] == name).any()]


def _names(runs: pd.DataFrame) -> str:
    return ", ".join(STYLES[name]["label"] for name, _ in in_order(runs, "algorithm", STYLES))
