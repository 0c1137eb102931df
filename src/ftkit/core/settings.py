"""What each command is asked to do: every option with its type, default and help, written once, in a file a command.

`ftkit.cli` turns these dataclasses into command lines; `ftkit.core.configuration` fills them from flags,
environment and files. Nothing here imports a heavy library.
"""

from ftkit.core.chat_settings import ChatSettings
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.eval_settings import EvalSettings
from ftkit.core.merge_settings import MergeSettings
from ftkit.core.model_settings import METHOD_FLAGS, METHOD_WORDS, ModelSettings, held_as_stored
from ftkit.core.options import Argument, Option, flag_of, require, require_seed
from ftkit.core.prep_settings import PrepSettings
from ftkit.core.train_settings import TrainSettings

__all__ = [
    "METHOD_FLAGS", "METHOD_WORDS", "Argument", "ChatSettings", "EstimateSettings", "EvalSettings", "MergeSettings",
    "ModelSettings", "Option", "PrepSettings", "TrainSettings", "flag_of", "held_as_stored", "require", "require_seed",
]  # fmt: skip
