"""One table prints the same cells to a terminal, to Markdown and to HTML."""

import html
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from eigencache.report.core.measured import ABSENT, DOUBT


def _doubtful(cell: str) -> bool:
    return DOUBT in cell


@dataclass(frozen=True)
class Table:
    """Cells as text, with the notes that explain them and the warnings that belong to them.

    The first column names the row. `words` are the columns that hold words and not numbers.
    Printing an object of this class with a `rich` console splits it into blocks that fit the terminal.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()

    def _numeric(self, index: int) -> bool:
        return index > 0 and self.columns[index] not in self.words

    def _width(self, index: int) -> int:
        """Columns of a terminal that column `index` needs: a heading breaks between words, a number never breaks."""
        heading = max(map(len, self.columns[index].split(" ")))
        longest = max((len(line) for row in self.rows for line in row[index].split("\n")), default=0)
        return max(heading, longest if self._numeric(index) else min(longest, 32))

    def _blocks(self, room: int) -> list[list[int]]:
        """Indices of columns in groups that fit `room`, each group beginning with the first column."""
        gap, edges = 3, 2  # of the box that is drawn
        blocks: list[list[int]] = [[0]]
        for index in range(1, len(self.columns)):
            used = edges + sum(self._width(i) + gap for i in [*blocks[-1], index])
            if used > room and len(blocks[-1]) > 1:
                blocks.append([0])
            blocks[-1].append(index)
        return blocks

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Warnings first and loud, then the table in as many blocks as the width asks for, then the notes."""
        if self.warnings:
            body = Text("\n").join(Text(f"• {warning}") for warning in self.warnings)
            yield Panel(body, title=f"WARNING ({len(self.warnings)})", title_align="left", border_style="bold red")
        yield Text(self.title, style="bold")
        for block in self._blocks(options.max_width):
            grid = RichTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
            for index in block:
                side = "right" if self._numeric(index) else "left"
                grid.add_column(Text(self.columns[index]), justify=side, width=self._width(index))
            for row in self.rows:
                grid.add_row(*(self._styled(row[index]) for index in block))
            yield grid
        for note in self.notes:
            yield Text(note, style="dim")

    @staticmethod
    def _styled(cell: str) -> Text:
        return Text(cell, style="dim" if cell == ABSENT else "yellow" if _doubtful(cell) else "")

    def markdown(self) -> str:
        """GitHub Markdown; bars and line breaks inside cells are escaped."""

        def line(cells: tuple[str, ...]) -> str:
            return (
                "| "
                + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>") for cell in cells)
                + " |"
            )

        rule = "|" + "|".join("--:" if self._numeric(i) else ":--" for i in range(len(self.columns))) + "|"
        warnings = [f"> **WARNING** {' '.join(warning.split())}" for warning in self.warnings]
        parts = [f"**{self.title}**", "\n>\n".join(warnings), "\n".join([line(self.columns), rule, *map(line, self.rows)])]
        return "\n\n".join(part for part in [*parts, *(f"_{note}_" for note in self.notes)] if part) + "\n"

    def html(self) -> str:
        """A table with caption and scopes, in a box of its own that scrolls; every string is escaped."""

        def cell(index: int, text: str) -> str:
            words = html.escape(text).replace("\n", "<br>")
            if index == 0:
                return f'<th scope="row">{words}</th>'
            kind = "w" if not self._numeric(index) else "n doubt" if _doubtful(text) else "n none" if text == ABSENT else "n"
            return f'<td class="{kind}">{words}</td>'

        title = html.escape(self.title)
        head = "".join(
            f'<th scope="col"{"" if self._numeric(i) else " class=w"}>{html.escape(c)}</th>'
            for i, c in enumerate(self.columns)
        )
        body = "\n".join("<tr>" + "".join(cell(i, text) for i, text in enumerate(row)) + "</tr>" for row in self.rows)
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in self.notes)
        return (
            f'<div class=scroll role="region" aria-label="{title}" tabindex="0"><table><caption>{title}</caption>'
            f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{notes}\n"
        )
