"""Build an entry of a table from a recipe's settings: the constructor's signature is the schema."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fewmask.types import UserError

T = TypeVar("T")


def choose(table: Mapping[str, T], name: str, kind: str) -> T:
    """Return `table[name]`, or raise a UserError that lists the names there are."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(f"There is no {kind} named '{name}'.{hint} Choose one of: {', '.join(sorted(table))}.")


def build(factory: Callable[..., T], settings: Mapping[str, Any], where: str, **given: Any) -> T:
    """Call `factory(**given, **settings)` after checking the settings against its signature.

    `given` holds what the program supplies (an encoder, say) and a recipe may not set. Raises a UserError that names
    the key and lists the valid ones when a key is unknown or its value has the wrong type; no value is coerced but an
    int to a float and a list to a tuple.
    """
    return factory(**given, **check_settings(factory, settings, where, hidden=set(given)))


def check_settings(
    factory: Callable[..., Any], settings: Mapping[str, Any], where: str, hidden: set[str]
) -> dict[str, Any]:
    """Return the settings with their types checked against the factory's signature (see `build`)."""
    target = factory.__init__ if inspect.isclass(factory) else factory
    hints = get_type_hints(target)
    parameters = [p for p in inspect.signature(factory).parameters if p not in hidden]
    checked = {}
    for key, value in settings.items():
        if key not in parameters:
            raise UserError(f"Unknown setting '{where}.{key}'. Valid ones: {', '.join(parameters) or 'none'}.")
        checked[key] = check_type(hints.get(key, Any), value, f"{where}.{key}")
    return checked


def check_type(annotation: Any, value: Any, where: str) -> Any:
    """Return the value as the annotated type, or raise a UserError that names the setting."""
    try:
        # JSON's strict mode is the rule wanted: a list may be a tuple and 1 may be 1.0, but "3" is not 3.
        adapter = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
        return adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        raise UserError(f"Setting '{where}' cannot be {value!r}: {reason}.") from None
