"""Gates for Makefiles and CI: scores that must not be worse than a number, or than another model's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftkit.core.answer_scores import FIELD
from ftkit.core.scoring import is_lower_better
from ftkit.errors import ExitCode, UserError, did_you_mean


@dataclass(frozen=True)
class Gate:
    """A score and what it must reach."""

    name: str
    value: float

    def fault(self, scores: Mapping[str, float]) -> str | None:
        """What is wrong with the scores; None if they pass."""
        score = scores[self.name]
        if is_lower_better(self.name):
            return f"{self.name} is {score:.4g}, above {self.value:g}" if score > self.value else None
        return f"{self.name} is {score:.4g}, under {self.value:g}" if score < self.value else None


def read_gates(texts: Sequence[str]) -> list[Gate]:
    """NAME=VALUE each."""
    gates = []
    for text in texts:
        name, _, value = text.partition("=")
        try:
            gates.append(Gate(name.strip(), float(value)))
        except ValueError:
            hint = "--fail-under f1=0.7"
            raise UserError(f"--fail-under {text}: should be NAME=NUMBER", ExitCode.USAGE, hint=hint) from None
    return gates


def check_gates(gates: Sequence[Gate], names: Sequence[str]) -> None:
    """A usage error for a gate on a score that there is none of; single fields are known only afterwards."""
    for gate in gates:
        if gate.name not in names and not gate.name.startswith(FIELD):
            raise unknown(gate, names)


def unknown(gate: Gate, names: Sequence[str]) -> UserError:
    """The error for a gate on a score that there is none of."""
    hint = f"{did_you_mean(gate.name, list(names))}there is {', '.join(names)}"
    return UserError(f"--fail-under {gate.name}: no such score of these rows", ExitCode.USAGE, hint=hint)


def faults_of(gates: Sequence[Gate], scores: Mapping[str, float]) -> list[str]:
    """The gates that the scores do not pass, in words."""
    for gate in gates:
        if gate.name not in scores:
            raise unknown(gate, list(scores))
    return [fault for gate in gates if (fault := gate.fault(scores))]


def refuse(faults: Sequence[str]) -> None:
    """Exit 8 if there are faults."""
    if faults:
        hint = "the scores above are whole and written; train on, or lower the gate"
        raise UserError(f"gate failed: {'; '.join(faults)}", ExitCode.GATE, hint=hint)
