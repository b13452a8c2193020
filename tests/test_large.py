"""Models as large as people train: traced on the meta device, in the memory of a laptop."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_TRACE = """
import json, resource, sys, time
import torch, transformers
import secateurs

torch.set_num_threads(1)
config = transformers.LlamaConfig(
    hidden_size=2048, num_hidden_layers=22, intermediate_size=5632, num_attention_heads=32,
    num_key_value_heads=4, vocab_size=32000, use_cache=False,
)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).eval()
started = time.process_time()
graph = secateurs.trace(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)})
seconds = time.process_time() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; on macOS bytes
peak_gb = peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)
kinds = {kind: sum(group.kind == kind for group in graph.groups) for kind in ("head", "neuron", "embedding")}
print(json.dumps({"params": graph.cost().params, "seconds": seconds, "peak_gb": peak_gb, "kinds": kinds}))
"""


@pytest.mark.slow
def test_a_billion_parameters_are_traced_within_a_minute_and_two_gigabytes() -> None:
    """In a process of its own, so that its peak of memory is its own; the libraries take 0.8 GB of it."""
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _TRACE], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["params"] > 1.0e9
    assert found["kinds"] == {"head": 44, "neuron": 44, "embedding": 1}
    assert found["seconds"] < 60
    assert found["peak_gb"] < 2
