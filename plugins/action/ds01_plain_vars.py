"""Action: refuses templates in what was passed with `-e`. Documented in library/ds01_plain_vars.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.vars import load_extra_vars

_MARKERS = ("{{", "{%", "{#")


class ActionModule(ActionBase):
    """Looks at the extra variables as they were typed: reading one as a variable would already run it."""

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec({"names": {"type": "list", "elements": "str", "required": True}})
        typed = load_extra_vars(self._loader)
        found = [name for name in arguments["names"] if _has_template(typed.get(name))]
        if found:
            names = ", ".join(found)
            message = f"{names} holds a template ({{{{ }}}}, {{% %}}). Pass the plain text, such as my-project."
            result.update(failed=True, reason="invalid_input", msg=message)
        return {**result, "changed": False}


def _has_template(value: Any) -> bool:
    return any(marker in text for text in _texts(value) for marker in _MARKERS)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from (text for part in pair for text in _texts(part))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
