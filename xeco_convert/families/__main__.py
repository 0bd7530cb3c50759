"""`python -m xeco_convert.families`: the table of families in README.md, from the family files."""

from xeco_convert.families.registry import supported_model_types


def table() -> str:
    """The Markdown table of all families, in alphabetical order of model_type."""
    lines = ["| model_type | models | kept as in the source |", "|---|---|---|"]
    specs = supported_model_types().values()
    lines += [f"| `{spec.model_type}` | {spec.title} | {spec.kept} |" for spec in specs]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
