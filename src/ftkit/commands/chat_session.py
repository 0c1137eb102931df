"""What a conversation at the terminal holds: the turns, who may answer, a vote that is open, what was saved."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ftkit.core.conversation import Conversation, Message, Speaker


@dataclass(frozen=True)
class Vote:
    """Answers to one question under letters that do not say whose they are."""

    question: list[Message]
    takes_turns: bool
    answers: dict[str, str]
    """Letter -> answer."""
    speakers: dict[str, str]
    """Letter -> name of the speaker."""


@dataclass
class Session:
    """The state of a conversation at the terminal.

    saved: for each file how many turns of this conversation are in it. wins: votes that each speaker has won.
    """

    conversation: Conversation
    speakers: Sequence[Speaker]
    vote: Vote | None = None
    saved: dict[str, int] = field(default_factory=dict)
    wins: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Who may answer."""
        return [speaker.name for speaker in self.speakers]
