"""`lora-export run`: run the steps of a recipe, one after the other."""

from __future__ import annotations

from pathlib import Path

import click

from lora_export.commands.printing import JsonAnswer, print_lines
from lora_export.commands.verb import Verb
from lora_export.untrusted.documents import MAX_YAML_BYTES
from lora_export.untrusted.shown import command

# A printed command is copied, so none is cut; each quote takes five letters, each odd one up to ten.
_LONGEST = 10 * MAX_YAML_BYTES


@click.command(cls=Verb, short_help="Run a recipe: several verbs with their options, from a YAML file.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Give --force to every step that has this option.")
@click.option("--dry-run", is_flag=True, help="Check the recipe and print its commands; run nothing.")
@click.option(
    "--quiet", is_flag=True, help="Give --quiet to every step that has this option; print no step lines."
)
@click.pass_context
def run(context: click.Context, recipe: Path, force: bool, dry_run: bool, quiet: bool) -> None:
    """Run the steps of RECIPE in their order; stop at the first that fails.

    RECIPE is a YAML file, or the name of a recipe that comes with lora-export (demo-minilm). The whole
    recipe is checked before the first step. Paths in it are relative to the current directory.

    \b
    Example:
      lora-export run recipes/demo-minilm.yaml --dry-run
      lora-export run demo-minilm --dry-run
    """  # noqa: D301 - click's mark for "don't rewrap" is the character itself
    from lora_export.commands.own_recipes import find_recipe
    from lora_export.commands.recipe import load_recipe
    from lora_export.errors import LoraExportError
    from lora_export.storage.outputs import reading

    root, recipe = context.find_root(), find_recipe(recipe)
    group = root.command
    assert isinstance(group, click.Group)
    loaded = load_recipe(recipe, group.list_commands(root), lambda verb: group.get_command(root, verb))
    flags = [name for name, given in (("force", force), ("quiet", quiet)) if given]
    steps = list(loaded.steps)
    for flag in flags:
        steps = [step.with_flag(flag) for step in steps]
    if dry_run:
        print_lines(map(str, steps), most=_LONGEST)
        return
    loaded.check_needs()
    for number, step in enumerate(steps, 1):
        if not quiet:
            text = command(["lora-export", step.verb, *step.arguments])
            text = text or f"lora-export {step.verb}, with words that --dry-run prints"
            print_lines([f"step {number} of {len(steps)}: {text}"], err=True)
        if isinstance(root.obj, JsonAnswer):
            # A step that asks for JSON gets it for its errors too, as when it is typed.
            root.obj.is_given = "--json" not in step.arguments
        try:
            with (
                reading([recipe]),
                step.command.make_context(step.verb, list(step.arguments), parent=root) as inner,
            ):
                code = step.command.invoke(inner)
        except LoraExportError as error:
            error.message = f"step {number} ({step.verb}) of {recipe}: {error.message}"
            raise
        if isinstance(code, int) and code:
            context.exit(code)
