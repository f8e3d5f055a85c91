"""One model, one loop: requests, scheduler, KV cache, models, sampling, the engine process."""
