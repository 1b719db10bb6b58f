"""A column of values of any types."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
from datasets.features.features import register_feature


@dataclass
class AnyJson:
    """Values of any types, kept as JSON. That of `datasets` rounds numbers, and reads the text "7" as one."""

    dtype: ClassVar[str] = "string"
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="AnyJson", init=False, repr=False)

    def __call__(self) -> Any:
        """What it is on disk."""
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        """A value as JSON."""
        return None if value is None else json.dumps(value, ensure_ascii=False)

    def decode_example(self, text: str | None, token_per_repo_id: object = None) -> Any:
        """The value again."""
        return None if text is None else json.loads(text)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # the function is said to be experimental
    register_feature(AnyJson, "AnyJson")
