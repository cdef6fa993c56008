"""Values that a JSON schema allows, at random: the part of JSON Schema that the chart's schema uses."""

from __future__ import annotations

from typing import Any

import jsonschema
from hypothesis import strategies as st

Schema = dict[str, Any]


# Keywords that say how the parts of an object go together.
_COMBINING = ("oneOf", "allOf", "if", "then", "else", "minProperties")


def partial(schema: Schema) -> Schema:
    """The schema of what may be given where defaults fill the rest: none of the named keys is required."""
    if "properties" not in schema:
        return schema
    properties = {name: partial(found) for name, found in schema["properties"].items()}
    return {**schema, "properties": properties, "required": []}


class SchemaValues:
    """Makes strategies from the parts of one schema."""

    def __init__(self, root: Schema) -> None:
        self._root = root

    def values(self, schema: Schema | None = None) -> st.SearchStrategy[Any]:
        """Values that `schema` allows; the root's by default."""
        schema = self._root if schema is None else schema
        if "$ref" in schema:
            name = schema["$ref"].removeprefix("#/definitions/")
            return st.deferred(lambda: self.values(self._root["definitions"][name]))
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        return getattr(self, f"_{schema['type']}")(schema)

    def _object(self, schema: Schema) -> st.SearchStrategy[Any]:
        if "propertyNames" in schema:
            keys = self.values(schema["propertyNames"])
            return st.dictionaries(keys, self.values(schema["additionalProperties"]), max_size=2)
        known = {name: self.values(found) for name, found in schema.get("properties", {}).items()}
        required = {name: known[name] for name in schema.get("required", [])}
        optional = {name: found for name, found in known.items() if name not in required}
        made = st.fixed_dictionaries(required, optional=optional)
        return made.filter(self._fits(schema)) if set(_COMBINING) & set(schema) else made

    def _fits(self, schema: Schema) -> Any:
        # What refers to other parts was made right; only how the parts combine is left to check.
        combined = {key: schema[key] for key in _COMBINING if key in schema}
        return lambda value: jsonschema.Draft7Validator(combined).is_valid(value)

    def _array(self, schema: Schema) -> st.SearchStrategy[Any]:
        least = schema.get("minItems", 0)
        return st.lists(self.values(schema["items"]), min_size=least, max_size=least + 1)

    def _string(self, schema: Schema) -> st.SearchStrategy[Any]:
        if "pattern" not in schema:
            return st.text(st.characters(codec="ascii", min_codepoint=32), max_size=12)
        pattern = st.from_regex(schema["pattern"], fullmatch=True, alphabet=_PRINTABLE)
        rules = {"maxLength": 60, **schema}
        return pattern.filter(lambda value: jsonschema.Draft7Validator(rules).is_valid(value))

    def _integer(self, schema: Schema) -> st.SearchStrategy[Any]:
        return st.integers(schema["minimum"], schema.get("maximum", 1000))

    def _number(self, schema: Schema) -> st.SearchStrategy[Any]:
        return st.floats(
            schema.get("minimum", schema.get("exclusiveMinimum")),
            schema.get("maximum", schema.get("exclusiveMaximum")),
            exclude_min="exclusiveMinimum" in schema,
            exclude_max="exclusiveMaximum" in schema,
        )

    def _boolean(self, schema: Schema) -> st.SearchStrategy[Any]:
        return st.booleans()


_PRINTABLE = st.characters(codec="ascii", min_codepoint=32)
