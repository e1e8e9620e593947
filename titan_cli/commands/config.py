"""`titan config`: show, schema, diff, explain, list."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import typer

from titan_cli.context import config_of, no_flags, output_of
from titan_core.config.fields import fields, get, sections, suggest
from titan_core.config.load import Resolved, from_dict, load, to_dict
from titan_core.config.schema import Config
from titan_core.config.values import toml_value, type_name
from titan_core.runtime.errors import UsageError

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    help="Show, compare and explain configs.",
    epilog="\b\nExamples:\n  titan config show llama3_8b --why\n  titan config explain optimizer.lr\n"
    "  titan config diff llama3_8b my.toml\n  titan config schema > titan.schema.json",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def show(
    ctx: typer.Context,
    target: str | None = typer.Argument(None, metavar="[RECIPE|FILE|RUN]", help="Config; none: the defaults."),
    why: bool = typer.Option(False, "--why", help="Say where each value comes from."),
    help_comments: bool = typer.Option(False, "--help-comments", help="Write each key's help above it."),
    changed: bool = typer.Option(False, "--changed", help="Only what differs from the defaults."),
) -> None:
    """Print the resolved config as TOML."""
    if target is not None and Path(target).is_dir():
        no_flags(ctx)  # what a run recorded is what it is
        resolved = Resolved(recorded_config(target))
    else:
        resolved = config_of(ctx, target)
    output_of(ctx).result(
        as_toml(resolved, why=why, helps=help_comments, changed=changed),
        config=to_dict(resolved.config),
        sources={key: source.where for key, source in resolved.sources.items()},
    )


@app.command()
def schema(ctx: typer.Context) -> None:
    """Print a JSON Schema for editors."""
    no_flags(ctx)
    tree = json_schema()
    output_of(ctx).result(json.dumps(tree, indent=2), json_schema=tree)


@app.command()
def diff(
    ctx: typer.Context,
    first: str = typer.Argument(..., help="Recipe, file or run folder."),
    second: str = typer.Argument(..., help="Recipe, file or run folder."),
) -> None:
    """Show the keys in which two configs differ."""
    no_flags(ctx)
    one, two = (recorded_config(name) if Path(name).is_dir() else load(name).config for name in (first, second))
    found = {key: (get(one, key), get(two, key)) for key in fields() if get(one, key) != get(two, key)}
    lines = [f"{key} = {toml_value(a)} -> {toml_value(b)}" for key, (a, b) in found.items()]
    output_of(ctx).result("\n".join(lines) or "no difference", differences={k: list(v) for k, v in found.items()})


@app.command()
def explain(ctx: typer.Context, key: str = typer.Argument(..., help="Key or section, e.g. optimizer.lr.")) -> None:
    """Say what a key means, what it takes, and its default."""
    no_flags(ctx)
    key = key.removeprefix("--").replace("-", "_")
    if key in sections():
        below = {name: field.help for name, field in fields().items() if name.startswith(f"{key}.")}
        width = max(map(len, below))
        lines = [f"{key}\n  {sections()[key]}", *(f"  {name:<{width}}  {text}" for name, text in below.items())]
        output_of(ctx).result("\n".join(lines), section=key, help=sections()[key], keys=below)
        return
    known = fields().get(key)
    if known is None:
        near = suggest(key)
        tip = f"did you mean `{near}`?" if near else "`titan config list` shows every key"
        raise UsageError(f"unknown key `{key}`", tip=tip)
    text = f"{key}\n  {known.help}\n  type: {type_name(known.type)}\n  default: {toml_value(known.default)}"
    output_of(ctx).result(text, key=key, help=known.help, type=type_name(known.type), default=known.default)


@app.command("list")
def list_keys(ctx: typer.Context, prefix: str = typer.Argument("", help="Only keys that begin so.")) -> None:
    """List keys with their defaults and help."""
    no_flags(ctx)
    chosen = [field for key, field in fields().items() if key.startswith(prefix)]
    if not chosen:
        near = difflib.get_close_matches(prefix, [*sections(), *fields()], n=1, cutoff=0.4)
        raise UsageError(f"no key begins with `{prefix}`", tip=f"did you mean `{near[0]}`?" if near else None)
    lines = [f"{field.key} = {toml_value(field.default)}\n    {field.help}" for field in chosen]
    output_of(ctx).result(
        "\n".join(lines),
        keys=[{"key": f.key, "default": f.default, "type": type_name(f.type), "help": f.help} for f in chosen],
    )


def as_toml(resolved: Resolved, *, why: bool = False, helps: bool = False, changed: bool = False) -> str:
    """Write a config as TOML; a key without a value stands as a comment."""
    lines: list[str] = []
    section = None
    for key, known in fields().items():
        value = get(resolved.config, key)
        if changed and value == known.default:
            continue
        where, _, name = key.rpartition(".")
        if where != section:
            lines += [""] * bool(lines) + [f"[{where}]"]
            section = where
        if helps:
            lines.append(f"# {known.help} ({type_name(known.type)})")
        line = f"# {name} is not set" if value is None else f"{name} = {toml_value(value)}"
        if why:
            source = resolved.sources.get(key)
            line = f"{line:<48}  # {source.where if source else 'default'}"
        lines.append(line)
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the config, with every key's help."""
    import msgspec

    tree = msgspec.json.schema(Config)
    definitions = tree["$defs"]

    def describe(name: str, prefix: str) -> None:
        for key, entry in definitions[name]["properties"].items():
            reference = entry.get("allOf", [entry])[0].get("$ref") if "allOf" in entry or "$ref" in entry else None
            if reference:
                describe(reference.rsplit("/", 1)[-1], f"{prefix}{key}.")
            elif f"{prefix}{key}" in fields():
                entry["description"] = fields()[f"{prefix}{key}"].help
                entry.setdefault("default", fields()[f"{prefix}{key}"].default)

    describe("Config", "")
    for definition in definitions.values():
        definition["additionalProperties"] = False  # an editor then marks a misspelt key
    definitions["Config"]["properties"]["extends"] = {
        "type": "string",
        "description": "Recipe or file whose values are taken where this file sets none.",
    }
    return tree


def recorded_config(folder: str) -> Config:
    """Return the config that a run's metrics file recorded last."""
    path = Path(folder) / "metrics.jsonl"
    config = None
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if '"config"' in line and line.endswith("\n"):  # else a run that was killed was writing it
                    config = json.loads(line).get("config", config)
    except FileNotFoundError:
        raise UsageError(f"`{folder}` is not a run folder: it has no metrics.jsonl") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"cannot read the run's records: {error}", where=str(path)) from None
    if not isinstance(config, dict):
        raise UsageError("the run recorded no config", where=str(path))
    return from_dict(config, str(path))
