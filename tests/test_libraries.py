"""What a command loads, and what it leaves until somebody asks for it."""

import subprocess
import sys

LEFT_OUT = ("torch._dynamo.eval_frame", "torch.distributed.tensor", "scipy.optimize", "torch.distributed.fsdp")


def run_apart(code: str) -> str:
    """What a fresh Python prints."""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def test_training_loads_no_compiler_until_something_compiles() -> None:
    """Optimizers and transformers' marks do without it; what compiles gets all of it, with the marks."""
    out = run_apart(f"""
import sys
from ftkit.libraries import import_transformers
import_transformers()
import torch, peft
from transformers import LlamaConfig, LlamaForCausalLM
from ftkit.core.adapters import make_trainable
from ftkit.core.optimizers import make_optimizer
from ftkit.core.train_settings import TrainSettings
shape = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = make_trainable(LlamaForCausalLM(LlamaConfig(**shape)), TrainSettings(r=2))
optimizer = make_optimizer(model, "adamw", 1e-3, 0.0)
model(torch.ones((1, 3), dtype=torch.int64)).logits.sum().backward()
optimizer.step()
optimizer.zero_grad()
print([name for name in {LEFT_OUT} if name in sys.modules])

from transformers.integrations import deepgemm
stand_in = sys.modules["torch._dynamo"]
assert ("assume_constant_result", deepgemm.is_sm100) in stand_in.marked
compiled = torch.compile(lambda x: x + 1, backend="eager")
print(int(compiled(torch.ones(()))), sys.modules["torch._dynamo"] is torch._dynamo is not stand_in)
print(torch.distributed.is_available(), stand_in.config is torch._dynamo.config)
""")
    assert out.splitlines() == ["[]", "2 True", "True True"]


def test_a_part_of_the_compiler_brings_the_whole() -> None:
    """Parts import each other in the order of the whole; each is loaded once."""
    out = run_apart("""
import sys
from ftkit.postponed_compiler import PartsFinder, postpone_compiler
postpone_compiler()
import torch._dynamo.utils as first
import torch
print(first is torch._dynamo.utils is sys.modules["torch._dynamo.utils"], first.counters is torch._dynamo.utils.counters)
print(any(isinstance(finder, PartsFinder) for finder in sys.meta_path))
""")
    assert out.splitlines() == ["True True", "False"]
