"""
The clock of a training loop: how long it has trained, how long a step takes, when it saved last. It
is one that cannot be set back, and nothing that it says affects the weights.
"""
import resource
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass

import common

def peak_memory():
    """The most bytes held so far: allocated on this process's GPU where it has used one, else of
    the whole process, as the operating system counts it."""
    torch = sys.modules.get("torch")  # not imported for this
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

@dataclass
class Clock:
    num_steps: int
    seconds_before: float            # of training, in earlier attempts
    save_interval: float             # seconds
    flops_per_token: float = 0.0
    peak_flops: float | None = None  # of all ranks, where it is known

    def __post_init__(self):
        self.began = self.last_save = self.last_step = time.monotonic()
        self.last_shown = 0.0
        self.save_waits = 0.0          # seconds that the training has waited for saves
        self.steps = deque(maxlen=20)  # seconds of the last ones

    def seconds(self):
        """Seconds of training, earlier attempts included."""
        return self.seconds_before + time.monotonic() - self.began

    def step_seconds(self):
        """The median of the last steps: evaluations and saves between them are no steps. Of two
        the smaller, since the first one compiles."""
        return statistics.median_low(self.steps)

    def save_due(self):
        return time.monotonic() - self.last_save >= self.save_interval

    def saved(self, since):
        """The training has waited for a save from `since` until now."""
        self.last_save = time.monotonic()
        self.save_waits += self.last_save - since

    def save_share(self):
        """Share of this attempt's time that the training has waited for saves, 0 to 1."""
        return self.save_waits / max(time.monotonic() - self.began, 1e-9)

    def tick(self, tokens):
        """A step has ended that has trained on `tokens`. -> the readings for its line of metrics"""
        now = time.monotonic()
        self.steps.append(now - self.last_step)
        self.last_step = now
        speed = tokens / self.step_seconds()
        reading = {"seconds": round(self.seconds(), 2), "tokens_per_second": round(speed),
                   "peak_gb": round(peak_memory() / 1e9, 3)}
        if self.peak_flops:
            reading["mfu"] = round(self.flops_per_token * speed / self.peak_flops, 4)
        return reading

    def show(self, step, words, reading):
        """Prints progress and time left, about once in two seconds. Of the first step of a start no
        speed and no time left: it may have compiled."""
        now = time.monotonic()
        if now - self.last_shown < 2.0 and step != self.num_steps:
            return
        self.last_shown = now
        done = f"step {step:,}/{self.num_steps:,} | {words}"
        so_far = f"{common.duration(self.seconds())} so far"
        if len(self.steps) == 1 and step < self.num_steps:
            common.print0(f"{done} | {so_far}; the first step after a start is slow")
            return
        speed = f"{reading['tokens_per_second']:,} tokens/s"
        if "mfu" in reading:
            speed += f" | MFU {100 * reading['mfu']:.1f} %"
        left = common.duration((self.num_steps - step) * self.step_seconds())
        common.print0(f"{done} | {speed} | {so_far}, {left} left")
