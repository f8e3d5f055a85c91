"""Operations on tensors. Knows nothing of requests; imports nothing of ours."""
