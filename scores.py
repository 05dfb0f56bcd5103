"""
Scores: accuracies with their intervals, and what may be called by the name of a public test set.
"""
import math

# items of the public test sets
FULL = {"arc_easy": 2376, "arc_challenge": 1172, "mmlu": 14042, "gsm8k": 1319, "humaneval": 164,
        "squad": 10570}

def score(outcomes, chance):
    """list of bool -> accuracy with its 95 % interval (Wilson 1927), and the accuracy centred:
    guessing 0, perfection 1.
    example: ([True, False] * 5, 0.25) -> accuracy 0.5, low 0.237, high 0.763, centred 0.333"""
    n, p, z = len(outcomes), sum(outcomes) / len(outcomes), 1.96
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = max(0.0, (middle - half) / (1 + z * z / n))
    high = min(1.0, (middle + half) / (1 + z * z / n))
    return {"accuracy": p, "n": n, "low": low, "high": high, "chance": chance,
            "centred": (p - chance) / (1 - chance), "outcomes": outcomes}

def parts(data, results):
    """Which results are of a part of a public test set only: {task: "30 of 164"}; they are not
    called by the name of the whole."""
    found = {}
    for name, result in results.items():
        n = result.get("n") if isinstance(result, dict) else None
        if data != "toy" and isinstance(n, int) and n < FULL.get(name, 0):
            found[name] = f"{n:,} of {FULL[name]:,}"
    return found
