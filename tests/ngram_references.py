"""Independent references: the smoothings written with dictionaries and loops, straight from their definitions."""

from collections import Counter, defaultdict

BOS, EOS = 1, 2


def ngrams(documents, order):
    """Every (context, token) of every context length, as tuples, oldest token first."""
    for document in documents:
        sequence = [BOS] * (order - 1) + [int(token) for token in document] + [EOS]
        for end in range(order - 1, len(sequence)):
            for length in range(order):
                yield tuple(sequence[end - length : end]), sequence[end]


def table(documents, order):
    counts = defaultdict(Counter)
    for context, token in ngrams(documents, order):
        counts[context][token] += 1
    return counts


def witten_bell(documents, order, vocab_size, scale):
    counts = table(documents, order)

    def probability(context, token):
        shorter = probability(context[1:], token) if context else 1 / (vocab_size - 2)
        seen = counts.get(context)
        if not seen:
            return shorter
        total, types = scale * sum(seen.values()), len(seen)
        return (scale * seen[token] + types * shorter) / (total + types)

    return probability


def mle(documents, order, vocab_size, scale):
    counts = table(documents, order)

    def probability(context, token):
        seen = counts.get(context)
        return seen[token] / sum(seen.values()) if seen else probability(context[1:], token)

    return probability


def kneser_ney(documents, order, vocab_size, scale):
    raw = table(documents, order)
    left = defaultdict(lambda: defaultdict(set))
    for context, token in ngrams(documents, order):
        if context:
            left[context[1:]][token].add(context[0])
    adjusted = defaultdict(dict)
    for context, seen in raw.items():
        for token, n in seen.items():
            whole = len(context) == order - 1 or context[0:1] == (BOS,)
            adjusted[context][token] = scale * n if whole else len(left[context][token])
    steps = [discounts_of(adjusted, length) for length in range(order)]

    def probability(context, token):
        shorter = probability(context[1:], token) if context else 1 / (vocab_size - 2)
        seen = adjusted.get(context)
        if not seen:
            return shorter
        cut = {word: min(n, steps[len(context)][step(n) - 1]) for word, n in seen.items()}
        kept = seen[token] - cut[token] if token in seen else 0.0
        return (kept + sum(cut.values()) * shorter) / sum(seen.values())

    return probability


def step(n):
    return max(1, min(3, round(n)))


def discounts_of(adjusted, length):
    n = Counter(max(1, round(c)) for context, seen in adjusted.items() if len(context) == length for c in seen.values())
    try:
        y = n[1] / (n[1] + 2 * n[2])
        found = [j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3)]
    except ZeroDivisionError:
        return [0.5, 1.0, 1.5]
    return found if n[1] and all(0 <= d <= j for j, d in zip((1, 2, 3), found, strict=True)) else [0.5, 1.0, 1.5]


BY_NAME = {"witten_bell": witten_bell, "mle": mle, "kneser_ney": kneser_ney}
