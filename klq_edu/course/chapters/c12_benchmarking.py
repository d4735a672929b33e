"""Chapter 12: benchmarking without fooling yourself. Its accelerator is simulated: no check depends on a timer."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor

from klq_edu.course.chapters import Chapter, tensor64
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake, Wrong, returned
from klq_edu.figures import BLUE, CONTENDERS, GREEN, GREY, ORANGE, Picture, panels, plain_axes

RESULTS = Path(__file__).parents[3] / "results"  # what was measured and committed
SECONDS = {"naive": 3e-3, "fused": 2e-3, "product": 1e-3}  # of the simulated accelerator, forward
BACKWARD = {"naive": 1.0, "fused": 1.5, "product": 0.0}  # the same, over forward
REPS = {"compiles": 2}  # to try an answer with, where not 20: few, as a median of many forgives a slow first call
FIRST = {"naive": 0.01, "fused": 0.4, "product": 0.0}  # seconds that keep the host busy at a first call
LAUNCH = 1e-12  # seconds to ask an asynchronous device for something
CLOSE = 1e-7  # two ratios are the same, if there is no drift
STEADY = 1e-3  # the same under drift, which turns cancel but for how they begin and end
SPARE = 10  # runs that nobody asked for: some warm up more than once
TURNS = 0.05  # what is further off under drift takes no turns
OFF = {"a little high": 1e-3, "a little off": [2e-3, -2e-3, 2e-3, -2e-3]}  # of fused's results, over their mean
TROUBLES = {  # what a machine does -> the flaw of a benchmark that is fooled by it
    "compiles": "no warm-up",
    "asynchronous": "no waiting",
    "backward": "unequal work",
    "draws": "inputs inside the clock",
    "drifts": "a mean of three in a fixed order",
    "hiccups": "a mean of three in a fixed order",
    "favours": "a mean of three in a fixed order",
    "wrong": "no look at the result",
}


class Lab:
    """A simulated accelerator: its clock moves by known costs only. It has no trouble, or some of TROUBLES and MORE.

    log: (name, seconds of the device) of every forward pass, in order.
    """

    def __init__(self, *troubles: str, seconds: dict[str, float] = SECONDS, drift: float = 0.04):
        self.troubles, self.seconds, self.drift = troubles, seconds, drift
        self.now = self.free = 0.0  # the host's clock; when the device will have done all it was asked for
        self.called, self.log, self.factor = Counter(), [], 1.0

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def synchronize(self) -> None:
        """Wait until everything asked for is done."""
        self.now = max(self.now, self.free)

    def inputs(self) -> Tensor:
        """Logits [tokens, vocabulary], drawn on the host."""
        self.now += 5 * self.seconds["naive"] * ("draws" in self.troubles)
        return 2 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(self, name: str, logits: Tensor | None = None) -> Tensor | None:
        """Forward pass of "naive" or "fused": log Σ exp of every row of the logits (if there are any), in float32."""
        runs = len(self.log)
        broken = "both wrong" in self.troubles or (name == "fused" and "wrong" in self.troubles)
        lucky = name == "fused" and self.called[name, "forward"] % 5 == 4
        self.factor = 1 + self.drift * runs * ("drifts" in self.troubles)
        self.factor *= 30.0 if "hiccups" in self.troubles and runs % 8 == 3 else 1.0
        self.factor *= 0.2 if "favours" in self.troubles and lucky else 1.0
        seconds = self.seconds[name] * (0.5 if broken else 1.0)
        self.log.append((name, seconds * self.factor))
        self._launch(name, "forward", seconds)
        if logits is not None:
            result = logits[:, : 16 if broken else None].float().logsumexp(-1)
            for trouble in OFF.keys() & self.troubles if name == "fused" else ():
                result += result.mean() * torch.tensor(OFF[trouble])
            return result

    def backward(self, name: str, logits: Tensor) -> Tensor:
        """Gradient of the sum of what `run` returns."""
        self._launch(name, "backward", self.seconds[name] * BACKWARD[name] * ("backward" in self.troubles))
        return logits.float().softmax(-1)

    def exact(self, logits: Tensor) -> Tensor:
        """What `run` should return, in float64."""
        self.now += 5 * self.seconds["naive"] * ("checks slowly" in self.troubles)
        return logits.logsumexp(-1)

    def _launch(self, name: str, stage: str, seconds: float) -> None:
        self.called[name, stage] += 1
        first = self.called[name, stage] == 1 and "compiles" in self.troubles
        queued = "asynchronous" in self.troubles
        self.now += LAUNCH * queued + FIRST[name] * first
        self.free = max(self.now, self.free) + seconds * self.factor
        if not queued:
            self.synchronize()


def broken_benchmark(lab, reps=3):
    """Six flaws."""
    logits = lab.inputs()
    start = lab.clock()
    for _ in range(reps):
        lab.run("fused", logits)
    fused = (lab.clock() - start) / reps

    start = lab.clock()
    for _ in range(reps):
        logits = lab.inputs()
        lab.run("naive", logits)
        lab.backward("naive", logits)
    naive = (lab.clock() - start) / reps
    return fused / naive


def benchmark(lab: Lab, reps: int = 20, flaws: Iterable[str] = (), middle=median) -> float:
    """Exercise 12.1, with some flaws put back (named by their TROUBLES, and "order": naive always goes first); not a
    number where a result is wrong."""
    logits, seconds = lab.inputs(), {"naive": [], "fused": []}
    wait = (lambda: None) if "asynchronous" in flaws else lab.synchronize

    def once(name: str) -> Tensor:
        wait()
        start = lab.clock()
        here = lab.inputs() if name == "naive" and "draws" in flaws else logits
        result = lab.run(name, here)
        if name == "naive" or "backward" not in flaws:
            lab.backward(name, here)
        wait()
        seconds[name].append(lab.clock() - start)
        return result

    for name in () if "compiles" in flaws else seconds:
        once(name)
        seconds[name].clear()
    turns = ["naive", "fused", *(("naive", "fused") if "order" in flaws else ("fused", "naive"))] * (reps // 2)
    for name in sorted(turns) if "drifts" in flaws else turns:
        result, exact = once(name), lab.exact(logits)
        if "wrong" not in flaws and not (result - exact).norm() < 1e-4 * exact.norm():
            return math.nan
    middle = mean if {"hiccups", "favours"} & {*flaws} else middle
    return middle(seconds["fused"]) / middle(seconds["naive"])


def effects() -> pd.DataFrame:
    """The ratio that is reported where the machine has a trouble, without the flaw and with it."""
    rows = []
    for trouble, flaw in TROUBLES.items():
        right, wrong = (benchmark(Lab(trouble), REPS.get(trouble, 20), flaws) for flaws in ((), {trouble}))
        half = {"drifts": ": the order", "hiccups": ": the mean", "favours": ": the mean"}.get(trouble, "")
        rows.append((flaw + half, DOES[trouble], right, wrong))
    return pd.DataFrame(rows, columns=["flaw", "the machine", "without", "with it"])


DOES = {
    "compiles": "compiles at the first call", "asynchronous": "works while the host goes on",
    "backward": "has a backward pass to do", "draws": "takes long to draw inputs",
    "drifts": "gets slower run by run", "hiccups": "is interrupted now and then",
    "favours": "now and then caches fused's data",
    "wrong": "gives a wrong result, sooner",
}  # fmt: skip


def _number(x) -> float:
    """An answer's result as a number; Wrong for anything else."""
    if isinstance(x, Tensor) and tensor64(x).shape != ():
        raise Wrong(f"one number is expected, yours is a tensor of shape {tuple(x.shape)}.")
    try:
        return float(x.detach() if isinstance(x, Tensor) else x)
    except (TypeError, ValueError):
        raise Wrong(f"one number is expected, yours is a {type(x).__name__}.") from None


def _sound(answer, seconds: dict[str, float], reps: int = 20) -> None:
    """Wrong, in words, unless the answer is right on a machine without any trouble, and runs each `reps` times."""
    lab, right = Lab(seconds=seconds), seconds["fused"] / seconds["naive"]
    got = _number(answer(lab, reps))
    if abs(got * right - 1) <= CLOSE:
        raise Wrong("upside down: fused's time over naive's is asked for, below 1 where fused is faster.")
    if not abs(got - right) <= CLOSE * right:
        shown = "NaN (not a number)" if math.isnan(got) else f"{got:.7g}"
        raise Wrong(f"wrong on a machine without any trouble: yours gives {shown} where {right:.7g} is expected.")
    runs = Counter(name for name, _ in lab.log)
    few = min(("naive", "fused"), key=runs.__getitem__)
    if runs[few] < reps:
        raise Wrong(f"the ratio is right on a machine without any trouble, but {few} was run {runs[few]} times where "
                    f"`reps` = {reps} timed repetitions of each are asked for.")  # fmt: skip


MORE = {  # (troubles at once, for answers that none of TROUBLES fools): what is wrong with an answer that they fool
    ("asynchronous", "backward"): "you read the clock while the backward pass is under way: synchronise after it too, "
    "not only before.",
    ("both wrong",): "both kernels are wrong here, and alike: compare with `lab.exact`, not with the other kernel.",
    ("a little high",): "a result that is 1e-3 too high passed: the relative error must be at most 1e-4, by (12.8), "
    "and either sign counts.",
    ("a little off",): "a result that is 2e-3 too high in one row and too low in the next passed: take the norm of the "
    "error, by (12.8), not its mean.",
    ("checks slowly",): "the result is checked while the clock runs: call `lab.exact` before or after.",
}


def _looked_closer(answer, seconds: dict[str, float]) -> None:
    """Wrong for what gets past all TROUBLES."""
    for troubles, message in MORE.items():
        right, got = (f(Lab(*troubles, seconds=seconds), 20) for f in (benchmark, lambda *x: _number(answer(*x))))
        if math.isnan(got) != math.isnan(right) or abs(got / right - 1) > CLOSE:
            raise Wrong(message)
    lab, reps = Lab(seconds=seconds), 6
    answer(lab, reps)
    if (most := max(Counter(name for name, _ in lab.log).values())) > reps + SPARE:
        raise Wrong(f"`reps` = {reps} timed repetitions of each were asked for, and one was run {most} times: is a "
                    "number of your own in the loop?")  # fmt: skip


def _misread(trouble: str, got: float, lab: Lab, reps: int) -> None:
    """Wrong, in words, where one trouble fooled an answer in another way than its Mistake says."""
    neither = lab.seconds["fused"] / lab.seconds["naive"]
    if trouble == "backward" and abs(got / neither - 1) <= CLOSE:
        raise Wrong("one flaw is left, the backward pass: it is in the time of neither. Put both passes of both in.")
    if trouble == "backward" and abs(got / (neither * (1 + BACKWARD["fused"])) - 1) <= CLOSE:
        raise Wrong("one flaw is left, unequal work: fused's time holds the backward pass, naive's does not.")
    names = [name for name, _ in lab.log][-2 * reps :]
    first = Counter(zip(names[::2], names[1::2]))
    if trouble == "drifts" and first["naive", "fused"] == first["fused", "naive"] == reps // 2:
        raise Wrong("the turns are right; but what you take of the sorted times is not their median, the mean of the "
                    "two in the middle: statistics.median, or .quantile(0.5).")  # fmt: skip


def _repaired(answer, naive: float, fused: float) -> dict[str, Tensor]:
    """1 for each trouble that does not fool the answer, 0 for others, ½ where turns in a fixed order leave some drift;
    Wrong says which where no Mistake would."""
    seconds, found, seen = {"naive": naive, "fused": fused}, {}, {}
    _sound(answer, seconds)
    for trouble in TROUBLES:
        reps, lab = REPS.get(trouble, 20), Lab(trouble, seconds=seconds)
        right, got = benchmark(Lab(trouble, seconds=seconds), reps), _number(answer(lab, reps))
        off = float(math.isnan(got) != math.isnan(right)) if math.isnan(right) else abs(got / right - 1)
        held = off <= (STEADY if trouble == "drifts" else CLOSE)
        found[trouble] = 1.0 if held else 0.5 * (trouble == "drifts" and off <= TURNS)
        seen[trouble] = got, lab, reps
    fooled = {trouble: held for trouble, held in found.items() if held < 1}
    if len(fooled) == 1:
        _misread(*fooled, *seen[next(iter(fooled))])
    if not fooled:
        _looked_closer(answer, seconds)
    if fooled and fooled not in NAMED:
        there = dict.fromkeys(TROUBLES[trouble] for trouble in fooled)
        gone = [flaw for flaw in dict.fromkeys(TROUBLES.values()) if flaw not in there]
        if len(there) == 1:
            raise Wrong(f"wrong on a machine that {', and on one that '.join(DOES[t] for t in fooled)}.")
        raise Wrong(f"still there: {'; '.join(there)}. Repaired: {'; '.join(gone) or 'none'}.")
    return found


ACCIDENTS = {"hiccups": 0.0, "favours": 0.0}  # both fool a mean
NAMED = [  # what the mistakes of exercise 12.1 are fooled by: trouble -> as in `_repaired`
    *({trouble: 0.0} for trouble in TROUBLES if trouble not in ACCIDENTS),
    *({"drifts": drift} | ACCIDENTS for drift in (0.0, 0.5)),
    {"drifts": 0.5}, ACCIDENTS, {"drifts": 0.5, "favours": 0.0},
]  # fmt: skip


def _costs(generator: Generator) -> tuple[float, float]:
    a, b = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return 2e-3 + a * 1e-3, (2e-3 + a * 1e-3) * (0.55 + 0.35 * b)


def _fooled(*troubles: str, middle=median):
    return lambda lab, reps: benchmark(lab, reps, troubles, middle)


def ratio_interval(naive: Tensor, fused: Tensor, draws: Tensor, middle=Tensor.quantile) -> tuple[Tensor, ...]:
    """Exercise 12.2: ratio of medians of [R] paired times, and its 95 % interval over resamples `draws` [B, R]."""

    def ratio(some: Tensor) -> Tensor:
        return middle(fused[some], 0.5, -1) / middle(naive[some], 0.5, -1)

    return ratio(torch.arange(len(naive))), *ratio(draws).quantile(torch.tensor([0.025, 0.975], dtype=naive.dtype))


def _interval(ratios, level=0.95, whole=None):
    """A mistake that resamples `ratios(naive, fused, draws)` [B]; `whole` gives its ratio from all the times."""

    def answer(naive, fused, draws):
        every = torch.arange(len(naive))[None]
        first = (whole or ratios)(naive, fused, every).squeeze()
        return first, *ratios(naive, fused, draws).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]))

    return answer


def _three_numbers(answer, *arguments) -> dict[str, Tensor]:
    """A tensor of three is three results."""
    result = answer(*arguments)
    return returned(lambda: list(result) if isinstance(result, Tensor) and result.shape == (3,) else result)


def _medians(naive, fused, draws):
    return fused[draws].quantile(0.5, -1) / naive[draws].quantile(0.5, -1)


def _runs_side_by_side(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """20 repetitions on a machine whose speed changes for both alike, and 400 resamples of them."""
    common, a, b = torch.rand(3, 20, generator=generator, dtype=torch.float64)
    naive, fused = (1 + 4 * common) * (1 + 0.2 * a), (0.6 + 2.4 * common) * (1 + 0.2 * b)
    return naive, fused, torch.randint(20, (400, 20), generator=generator)


def kernel_seconds(kernels: Tensor, n: int, v: int, size: int, bandwidth: float, peak: float) -> tuple:
    """Exercise 12.3: (naive, fused) seconds on a roofline, from `kernels` [K, 3]: reads, writes, operations."""
    moved, operations = kernels[:, :2].sum(1) * n * v * size, kernels[:, 2] * n * v
    naive = torch.maximum(moved / bandwidth, operations / peak).sum()
    return naive, torch.maximum(torch.tensor(2.0 * n * v * size / bandwidth), operations.sum() / peak)


def _wrong_seconds(columns=(0, 1), scale=1.0, join=torch.maximum, late=False, reads=2.0, writes=0.0, **other):
    over, last = other.get("over", torch.sum), other.get("last", join)  # kernels of naive; the two times of fused

    def answer(kernels, n, v, size, bandwidth, peak):
        moved, operations = kernels[:, columns].sum(1) * n * v * size * scale, kernels[:, 2] * n * v
        apart = (moved.sum() / bandwidth, operations.sum() / peak)
        naive = join(*apart) if late else over(join(moved / bandwidth, operations / peak))
        fused = (reads + writes) * n * v * size * scale / bandwidth
        return naive, last(torch.as_tensor(fused), operations.sum() / peak)

    return answer


def _on_two_devices(answer, kernels, n, v, size, bandwidth, *ridges) -> dict[str, Tensor]:
    """Both results where operations decide for the fused kernel, and where bytes do."""
    found = {}
    for slow, ridge in zip(("operations decide", "bytes decide"), ridges, strict=True):
        result = answer(kernels, n, v, size, bandwidth, ridge * bandwidth)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise Wrong("a pair is expected: naive seconds, fused seconds.")
        where = f"on a device where {slow} the fused time, "
        found |= {f"{where}{who}'s seconds: ": x for who, x in zip(("naive", "fused"), result)}
    return found


def _kernels(generator: Generator) -> tuple:
    """Six kernels, N, V, bytes, bandwidth, and a device's peak over bandwidth twice. On the second device the second
    kernel is bound by operations, and all together, fused, by bytes."""
    kernels = torch.stack([
        torch.randint(1, 4, (6,), generator=generator), torch.randint(0, 2, (6,), generator=generator),
        torch.randint(1, 20, (6,), generator=generator),
    ], 1).double()  # fmt: skip
    kernels[0], kernels[1] = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 90.0])
    n, v = torch.randint(1000, 9000, (2,), generator=generator).tolist()
    size, some = int(2 + 2 * torch.randint(2, (), generator=generator)), torch.rand(3, generator=generator).tolist()
    return kernels, n, v, size, 1e9 * (1 + 4 * some[0]), (5 + 15 * some[1]) / size, (85 + 4 * some[2]) / size


def committed() -> tuple[pd.DataFrame, dict]:
    """The benchmark's committed rows and where they come from."""
    return pd.read_csv(RESULTS / "bench.csv"), json.loads((RESULTS / "bench.json").read_text(encoding="utf-8"))


def draw_order(figure: FigureBase, drift: float, order: str, hiccups: bool) -> None:
    """Left: the time of every run on the simulated machine, in order; right: the ratio that comes out, by statistic."""
    left, right = plain_axes(figure, 2)
    lab = Lab("drifts", *("hiccups", "favours") * hiccups, drift=drift)
    benchmark(lab, 12, {"drifts", "compiles"} if order == "blocks" else {"compiles"})
    times = {name: [(i, 1e3 * s) for i, (n, s) in enumerate(lab.log) if n == name] for name in ("naive", "fused")}
    for (name, points), colour, marker in zip(times.items(), (ORANGE, BLUE), "so"):
        left.plot(*zip(*points), marker, color=colour, ms=4, label=name)
    left.set(xlabel="run", ylabel="time of the run [ms]", yscale="log", ylim=(0.2, 1000), title="in the order they ran")
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    naive, fused = ([s for _, s in points] for points in times.values())
    ratios = [f(fused) / f(naive) for f in (mean, median, min)]
    right.bar(range(3), ratios, color=[GREY, GREEN, GREY], hatch="//", edgecolor="white")
    right.axhline(SECONDS["fused"] / SECONDS["naive"], color="black", ls="--", lw=1.2, label="the truth")
    for place, ratio in enumerate(ratios):
        right.text(place, min(ratio, 1.9) + 0.03, f"{ratio:.2f}", ha="center", fontsize=9)
    right.set_xticks(range(3), ["mean", "median", "minimum"])
    title = f"{order}, drift {drift:.0%} a run" + ", hiccups" * hiccups
    right.set(ylabel="fused over naive, as reported", ylim=(0, 2.2), title=title)
    right.legend(frameon=False, fontsize=8, loc="upper right")


ORDER = Widget(
    "12-order", draw_order,
    {"drift": [0.0, 0.01, 0.04], "order": ["blocks", "turns"], "hiccups": [False, True]},
    [
        {"drift": 0.04, "order": "blocks", "hiccups": False},
        {"drift": 0.04, "order": "turns", "hiccups": False},
        {"drift": 0.0, "order": "blocks", "hiccups": True},
        {"drift": 0.0, "order": "turns", "hiccups": True},
    ],
    "Above, a simulated machine that gets slower with every run. In blocks (left), fused runs on the fresh machine and "
    "naive on the tired one, and every statistic flatters fused. By turns (right) the drift falls on both. Below, a "
    "machine without drift, where some runs are interrupted and some of fused's are lucky: mean and minimum go wrong "
    "in either order, and only the median is right. So turns cure drift, and medians cure accidents.",
    "For four settings, times of runs in the order they ran, and bars of the ratio reported by mean, median and "
    "minimum against a dashed line at the true ratio of 0.67. With drift: below it in blocks, at it by turns. With "
    "hiccups: only the median is on it.",
    size=(7.4, 3.0),
)  # fmt: skip


def draw_roofline(roofs: dict[str, tuple[float, float]], kernels: dict[str, float]) -> Picture:
    """Rooflines of devices, (bytes per second, operations per second); kernels by their operations per byte."""
    figure, (axis,) = panels(1, width=7.6, height=4.2)
    low, high = 0.3, 3e4
    intensity = np.geomspace(low, high, 300)
    for (name, (bandwidth, peak)), colour, line in zip(roofs.items(), (GREY, BLUE, GREEN), ("--", "-", "-.")):
        roof = np.minimum(peak, bandwidth * intensity)
        axis.plot(intensity, roof / 1e12, color=colour, ls=line, label=f"{name}, bends at {peak / bandwidth:.0f}")
    bandwidth, peak = next(reversed(roofs.values()))
    for (name, x), marker in zip(kernels.items(), "osD^vP"):
        axis.plot(
            x, min(peak, bandwidth * x) / 1e12, marker, color=ORANGE, ms=8, ls="", label=f"{name}: {x:,.{x < 100:d}f}"
        )
    axis.set(
        xlabel="operations per byte", ylabel="attainable [10¹² operations/s]", xscale="log", yscale="log",
        xlim=(low, high),
    )  # fmt: skip
    axis.legend(loc="lower right", fontsize=8)
    return Picture(
        figure,
        "What each device could do at best, against how many operations a kernel does per byte it must move. On the "
        f"slope bytes decide, on the flat part operations do. Marks: kernels in bf16, on the roof of the "
        f"{next(reversed(roofs))}. What starts from logits lies on the slope; what starts from hidden states does its "
        "products, and lies on the flat part if it has tokens enough. From data sheets, not measured.",
        "Rooflines of several devices on logarithmic axes, with kernels from logits on the slope and kernels from "
        "hidden states on the flat part.",
    )


COMMITTED = {"color": GREY, "marker": "s", "ls": "", "label": "committed"}
HERE = {"color": BLUE, "marker": "o", "ls": "", "label": "here"}


def draw_beside(mine: pd.DataFrame, theirs: pd.DataFrame) -> Picture:
    """Seconds and units of forward and backward pass, here and in the committed file, by workload and contender."""
    keys = ["workload", "contender"]
    both = mine[mine["stage"] == "both"].merge(theirs[theirs["stage"] == "both"], on=keys, suffixes=("", "_there"))
    both = both.drop_duplicates(keys).iloc[::-1].reset_index(drop=True)
    figure, axes = panels(2, width=4.6, height=1.4 + 0.5 * len(both))
    for axis, column, label in zip(axes, ("seconds", "units"), ("time [s]", "time [N×H×V products]")):
        for suffix, shift, look in (("_there", 0.12, COMMITTED), ("", -0.12, HERE)):
            low, mid, high = (both[f"{column}{end}{suffix}"] for end in ("_low", "", "_high"))
            axis.errorbar(mid, both.index + shift, xerr=[mid - low, high - mid], **look)
        axis.set(xlabel=label, ylabel="", ylim=(-0.6, len(both) - 0.4))
    low, high = (both[["seconds", "seconds_there"]].agg(f).agg(f) for f in ("min", "max"))
    axes[0].set(xscale="log", ylabel="workload: contender", xlim=(low / 5, 5 * high))
    axes[0].minorticks_off()
    axes[1].set_xlim(left=0)
    axes[0].set_yticks(both.index, both["workload"] + ": " + both["contender"])
    axes[1].set_yticks(both.index, [""] * len(both))
    axes[1].legend(frameon=False, fontsize=8)
    return Picture(
        figure,
        "The machine that this page was run on (circles) beside the committed file (squares); whiskers from lowest to "
        "highest repetition. Seconds (left, logarithmic) belong to a machine and a size, and cannot be compared. Units "
        "(right) can, as far as products and everything else slow down alike.",
        "Two plots of time by workload and contender, here and in the committed file, in seconds and in products.",
    )


def draw_repetitions(naive: list[dict], fused: list[dict], draws: Tensor) -> Picture:
    """From repetitions as `interleave` gives them. Left: seconds of each, and of the product beside it; right: ratios
    of medians of units in resamples, with their interval."""
    figure, (left, right) = panels(2, width=4.8, height=3.4)
    for label, runs, key in (("naive", naive, "naive"), ("fused", fused, "ours (torch)")):
        colour, line, marker, _ = CONTENDERS[key]
        left.plot([r["both"] for r in runs], color=colour, ls=line, marker=marker, ms=4, label=label)
    left.plot([r["gemm"] for r in fused], color=GREY, ls=":", marker="x", ms=4, label="a product")
    left.set(xlabel="repetition", ylabel="time [s]", ylim=(0, 1.25 * max(r["both"] for r in naive + fused)))
    left.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    units = [torch.tensor([r["both"] / r["gemm"] for r in runs], dtype=torch.float64) for runs in (naive, fused)]
    ratio, low, high = ratio_interval(*units, draws)
    right.hist(_medians(*units, draws).numpy(), bins=30, color=BLUE, alpha=0.5)
    right.axvline(ratio, color="black", label=f"ratio of medians {ratio:.2f}")
    right.axvline(low, color=ORANGE, ls="--", label=f"95 %: {low:.2f} to {high:.2f}")
    right.axvline(high, color=ORANGE, ls="--")
    right.set(xlabel="fused over naive", ylabel="resamples")
    right.legend(frameon=False, fontsize=8)
    return Picture(
        figure,
        "Measured where this page was run. Left: every repetition, and the product beside it. Right: the ratio of "
        "medians in resamples of the repetitions, each in units of its own product; dashed: the middle 95 %.",
        "Curves of the time of each repetition for naive, fused and a product, and a histogram of resampled ratios.",
    )


EXERCISES = {
    "12.1": Exercise(
        "12.1", "Repair the benchmark", 3, 20, benchmark, _costs,
        (
            Mistake("no warm-up", _fooled("compiles"),
                    "one flaw is left, no warm-up: a first call compiles and allocates. Do all that you time once "
                    "before, forward and backward, of both."),
            Mistake("no waiting", _fooled("asynchronous"),
                    "one flaw is left, no waiting: a call only asks for work. Synchronise before you read the clock, "
                    "at the start and at the end."),
            Mistake("unequal work", _fooled("backward"),
                    "one flaw is left, unequal work: naive's time holds the backward pass, fused's does not."),
            Mistake("inputs inside", _fooled("draws"),
                    "one flaw is left, inputs inside the clock: they are drawn while the clock runs. Draw them once, "
                    "before."),
            Mistake("blocks", _fooled("drifts"),
                    "one flaw is left, the fixed order: all of one, then all of the other. Take turns, and change who "
                    "goes first."),
            Mistake("who goes first", _fooled("order"),
                    "one flaw is left, the fixed order: you take turns, but who goes first is never changed (or not "
                    "equally often), and the other one's runs are always the later ones. Naive, fused, fused, naive."),
            Mistake("who goes first, and mean", _fooled("order", "hiccups"),
                    "one flaw is left, in two halves: the same one goes first each time, and you take means."),
            Mistake("blocks and mean", _fooled("drifts", "hiccups"),
                    "one flaw is left, in two halves: all of one comes before all of the other, and you take means."),
            Mistake("mean", _fooled("hiccups"),
                    "the turns are right, but one run that was interrupted spoils a mean: take medians."),
            Mistake("minimum", _fooled(middle=min),
                    "the turns are right, but a minimum is the luckiest run, and the two are not equally lucky: take "
                    "medians."),
            Mistake("not checked", _fooled("wrong"),
                    "one flaw is left, no look at the result: a kernel that skips half of the work is fast. Compare "
                    "with `lab.exact`, and return `math.nan` where the relative error is above 1e-4."),
        ),
        ("Write a function that runs one of the two once and returns its seconds and its result; everything else is "
         "a loop over it. What must happen just before each look at the clock?",
         "Warm both up, forward and backward, and check their results then. After that time them as naive, fused, "
         "fused, naive, and so on, `reps` each, into two lists.",
         "`lab.synchronize(); start = lab.clock(); result = lab.run(name, logits); lab.backward(name, logits); "
         "lab.synchronize(); return lab.clock() - start, result`. Return the ratio of `statistics.median`s."),
        probe=_repaired,
    ),
    "12.2": Exercise(
        "12.2", "An interval for a ratio of medians", 2, 15, ratio_interval, _runs_side_by_side,
        (
            Mistake("unpaired", _interval(lambda a, b, d: b[d].quantile(0.5, -1) / a[d.flip(0)].quantile(0.5, -1),
                                          whole=_medians),
                    "you resampled the two separately. Repetition i of both was taken in the same minute: one row of "
                    "`draws` picks both, and the machine's moods cancel."),
            Mistake("means", _interval(lambda a, b, d: b[d].mean(-1) / a[d].mean(-1)),
                    "these are means: one interrupted repetition decides."),
            Mistake("lower median", lambda a, b, d: ratio_interval(a, b, d, lambda x, q, dim: x.median(dim).values),
                    "torch.median takes the lower one of the two in the middle; .quantile(0.5, dim=-1) their mean."),
            Mistake("median of ratios", _interval(lambda a, b, d: (b / a)[d].quantile(0.5, -1)),
                    "that is the median of the ratios; a ratio of medians is asked for (and stated, when reported)."),
            Mistake("interval of median ratios", _interval(lambda a, b, d: (b / a)[d].quantile(0.5, -1),
                                                           whole=_medians),
                    "the ratio is right; but you resampled the median of the ratios, and the interval must be that of "
                    "the ratio of medians: the medians first, for each row of `draws`."),
            Mistake("swapped ends", lambda a, b, d: (lambda r, low, high: (r, high, low))(*ratio_interval(a, b, d)),
                    "all three numbers are right, but the ends are swapped: the lower one (0.025) comes first."),
            Mistake("wrong axis", _interval(lambda a, b, d: b[d].quantile(0.5, 0) / a[d].quantile(0.5, 0),
                                            whole=_medians),
                    "the ratio is right; but you took medians over the resamples: a resample is a *row* of `draws`, so "
                    "the median is along dim=-1."),
            Mistake("upside down", _interval(lambda a, b, d: 1 / _medians(a, b, d)),
                    "the ratio is upside down: fused over naive, below 1 where fused is faster."),
            Mistake("90 %", _interval(_medians, level=0.9),
                    "that is a 90 % interval: 95 % leaves 2.5 % on each side."),
            Mistake("minima", _interval(lambda a, b, d: b[d].amin(-1) / a[d].amin(-1)),
                    "these are minima: the luckiest repetition, and a number that falls the longer you measure."),
            Mistake("spread of runs", lambda a, b, d: (
                        _medians(a, b, torch.arange(len(a))), *(b / a).quantile(torch.tensor([0.025, 0.975]))),
                    "the ratio is right; your interval is the spread of single repetitions, and does not shrink with "
                    "their number. Resample, and take the quantiles of the resampled *ratios of medians*."),
        ),
        ("`naive[draws]` has shape [B, R]: row b is resample b. What is one ratio of medians per row?",
         "`fused[draws].quantile(0.5, dim=-1) / naive[draws].quantile(0.5, dim=-1)` are B ratios.",
         "Their quantiles at 0.025 and 0.975 are the interval; the ratio itself is that of all repetitions."),
        probe=_three_numbers,
    ),
    "12.3": Exercise(
        "12.3", "Seconds from bytes", 2, 12, kernel_seconds, _kernels,
        (
            Mistake("maximum of sums", _wrong_seconds(late=True),
                    "each naive kernel waits for the one before: take the longer time kernel by kernel, then add up. "
                    "You added first, as if one kernel's bytes could hide behind another's operations."),
            Mistake("no element size", lambda k, n, v, s, b, p: kernel_seconds(k, n, v, 1, b, p),
                    "you counted elements; bandwidth is in bytes per second, so multiply by `size`."),
            Mistake("bits", _wrong_seconds(scale=8.0),
                    "you counted bits: `size` and the bandwidth are in bytes."),
            Mistake("reads only", _wrong_seconds(columns=(0,)),
                    "you forgot what the naive kernels write: their results go to memory and come back."),
            Mistake("no overlap", _wrong_seconds(join=torch.add),
                    "you added the two times: a kernel moves bytes while it computes, so the longer one counts."),
            Mistake("no overlap in naive", _wrong_seconds(join=torch.add, last=torch.maximum),
                    "fused is right; but for naive you added bytes and operations: each of its kernels moves bytes "
                    "while it computes, too."),
            Mistake("no overlap in fused", _wrong_seconds(last=torch.add),
                    "naive is right; but for fused you added bytes and operations: it moves bytes while it computes."),
            Mistake("slowest kernel", _wrong_seconds(over=torch.max),
                    "fused is right; but for naive you took its slowest kernel only: they run one after the other, so "
                    "their times add up."),
            Mistake("fused by bytes", _wrong_seconds(last=lambda moved, _: moved),
                    "naive is right, and fused where bytes decide; but it still does all the operations, and on a "
                    "slow enough device they take longer than its bytes."),
            Mistake("the shorter", _wrong_seconds(join=torch.minimum),
                    "you took the shorter of the two times; what is slower decides."),
            Mistake("fused writes", _wrong_seconds(writes=1.0),
                    "naive is right; but the fused kernel writes a few numbers per token and nothing of size [N, V]."),
            Mistake("fused reads one", _wrong_seconds(reads=1.0),
                    "naive is right; but where bytes decide your fused time is too short: a KL needs two "
                    "distributions, so the fused kernel reads two [N, V] arrays, of `size` bytes a number."),
        ),
        ("For one kernel: bytes over bandwidth, operations over peak. Which of the two do you wait for?",
         "`moved = (reads + writes) * n * v * size`; the maximum for each kernel, then the sum over kernels.",
         "Fused: max(2 · n · v · size / bandwidth, all operations · n · v / peak)."),
        probe=_on_two_devices,
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "12", "benchmarking", "Benchmarking without fooling yourself",
    "Is the fused way faster, by how much, and in which sentence may you say so?",
    "kernels", "Table 3 (cost per update), as measured here",
    ("klq_edu.bench.measure.interleave", "klq_edu.bench.measure.errors", "klq_edu.bench.roofline.floor_seconds"),
    needs=("07", "11"), place=(9, -1.4), short="benchmarking", exercises=EXERCISES,
)  # fmt: skip
