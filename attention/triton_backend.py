def refusal(q, k, v, pattern, logits):
    return "not yet"
