"""A table that prints the same cells to a terminal, to Markdown and to HTML."""

import html
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from eigencache.report.core.measured import ABSENT, DOUBT

_GAP = 2  # characters between two columns
_WORD_LIMITS = (32, 20, 12, 8)  # widths to which a column of words is folded, one after another, to fit a terminal
_NAMED = 6  # hidden columns that the note names


def _doubtful(cell: str) -> bool:
    return DOUBT in cell


@dataclass(frozen=True)
class Table:
    """A table of text cells with notes and warnings, for a terminal, Markdown and HTML.

    Markdown and HTML have all columns. On a terminal (`rich.console.Console.print`) columns of words are folded, and
    columns that do not fit are hidden and named in a note.

    Attributes:
        title: One line above the table.
        columns: Headings.
        rows: Cells, as many per row as headings; a line break in a cell is kept.
        notes: Explanations below the table.
        warnings: Warnings above the table.
        words: Headings of columns of words; all others but the first are numbers and are aligned to the right.
        identity: Leading columns that tell rows apart; they are never hidden.
        hidden_first: Headings of columns to hide first on a narrow terminal; then the rightmost are hidden.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()
    identity: int = 1
    hidden_first: tuple[str, ...] = ()

    def _numeric(self, index: int) -> bool:
        return index > 0 and self.columns[index] not in self.words

    def _longest(self, index: int) -> int:
        """Return the length of the longest line of a cell of column `index`."""
        return max((len(line) for row in self.rows for line in row[index].split("\n")), default=0)

    def _width(self, index: int, limit: int) -> int:
        """Return the characters that column `index` needs: a heading breaks between words, a number never breaks."""
        heading = max(map(len, self.columns[index].split(" ")))
        longest = self._longest(index)
        return max(heading, longest if self._numeric(index) else min(longest, limit))

    def _needed(self, shown: list[int], limit: int) -> int:
        """Return the characters of a row of the columns `shown`, with words folded to `limit`."""
        return sum(self._width(index, limit) for index in shown) + _GAP * (len(shown) - 1)

    def _fitting(self, room: int) -> tuple[list[int], list[int]]:
        """Return the indices of the columns that fit `room`, and their widths."""
        shown = list(range(len(self.columns)))
        first = [self.columns.index(name) for name in self.hidden_first]
        order = [*first, *(i for i in reversed(shown) if i not in first)]
        order = [index for index in order if index >= self.identity]
        fold = _WORD_LIMITS[1]
        while self._needed(shown, fold) > room and len(shown) > self.identity + 1:
            shown.remove(order.pop(0))
        limit = next((limit for limit in _WORD_LIMITS if self._needed(shown, limit) <= room), _WORD_LIMITS[-1])
        widths = {index: self._width(index, limit) for index in shown}
        spare = room - self._needed(shown, limit)
        lacking = {i: self._longest(i) - widths[i] for i in shown if not self._numeric(i)}
        for index, lack in sorted(lacking.items(), key=lambda item: item[1]):  # spare room goes to folded words
            added = max(0, min(lack, spare))
            widths[index] += added
            spare -= added
        return shown, [widths[index] for index in shown]

    def _hidden_note(self, shown: list[int], room: int) -> str:
        """Name the hidden columns, and the width at which all are shown."""
        hidden = [name for index, name in enumerate(self.columns) if index not in shown]
        names = "; ".join(hidden[:_NAMED]) + (f" and {len(hidden) - _NAMED} more" if len(hidden) > _NAMED else "")
        needed = self._needed(list(range(len(self.columns))), _WORD_LIMITS[1])
        return (
            f"{len(hidden)} column{'s' if len(hidden) > 1 else ''} hidden at {room} characters: {names}. All columns need "
            f"{needed} characters: widen the terminal, or set COLUMNS={needed}."
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the warnings, the title, the columns that fit the terminal, the notes, and an empty line."""
        if self.warnings:
            body = Text("\n").join(Text(f"• {warning}") for warning in self.warnings)
            yield Panel(body, title=f"WARNING ({len(self.warnings)})", title_align="left", border_style="bold red")
        yield Text(self.title, style="bold")
        shown, widths = self._fitting(options.max_width)
        grid = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
        for index, width in zip(shown, widths, strict=True):
            side = "right" if self._numeric(index) else "left"
            grid.add_column(Text(self.columns[index]), justify=side, width=width, overflow="fold")
        for row in self.rows:
            grid.add_row(*(self._styled(row[index]) for index in shown))
        yield grid
        hidden = [self._hidden_note(shown, options.max_width)] if len(shown) < len(self.columns) else []
        for note in (*self.notes, *hidden):
            yield Text(note, style="dim")
        yield Text()

    @staticmethod
    def _styled(cell: str) -> Text:
        return Text(cell, style="dim" if cell == ABSENT else "yellow" if _doubtful(cell) else "")

    def markdown(self) -> str:
        """Return GitHub Markdown with all columns; bars and line breaks inside cells are escaped."""

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
        """Return an HTML table with all columns in a scrolling box; every string is escaped."""

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
