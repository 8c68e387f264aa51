"""Tables of a forecast: every number that decides, in rows that can be compared."""

from io import StringIO

from visionloom.common.screen import PlainConsole
from visionloom.forecast.results import RunForecast
from visionloom.forecast.show.tables import tables_of
from visionloom.tests.forecast.made import good_forecast, hostile_forecast, run_forecast


def lines(forecast: RunForecast) -> list[str]:
    """What the screen shows of a forecast."""
    out = StringIO()
    console = PlainConsole(file=out, width=200)
    for table in tables_of(forecast):
        console.print(table)
    return out.getvalue().splitlines()


def cells(shown: list[str], first: str) -> list[list[str]]:
    """The cells of the rows that begin with a word."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown if "│" in line]
    return [row for row in rows if row[0] == first]


def test_memory_and_work_of_a_kind_of_rank() -> None:
    memory, work = cells(lines(run_forecast()), "3")
    assert memory[:3] == work[:3] == ["3", "4", "layers 27-35, loss"]
    assert memory[3:] == ["10.0", "20.0", "15.0", "20.0", "2.0", "0.5", "0.5", "68.0", "85%"]
    assert work[3:] == ["100.0", "200.0", "5,100", "11,832", "1"]


def test_a_phase_and_the_run() -> None:
    shown = lines(good_forecast())
    (totals,) = cells(shown, "short")
    assert cells(shown, "language") == [["language", "2.500", "2.500"]]
    assert cells(shown, "step") == [["step", "4.000", "4.000"]]
    assert totals[1:6] == ["8,192", "1,000", "4.000", "128,000", "31.0%"]
    assert totals[6:] == ["27.0%", "0.200", "68.0", "0.05", "18"]
    (together,) = cells(shown, "all")
    # 2 x 1,000 steps of 4 s on 16 GPUs.
    assert together[2] == "2,000" and together[-3:] == ["68.0", "0.09", "36"]


def test_every_table_says_that_it_is_predicted() -> None:
    tables = [each for each in tables_of(good_forecast()) if not isinstance(each, str)]
    assert len(tables) == 6
    assert all("on more none was measured" in str(table.title) for table in tables)


def test_a_name_gives_no_orders_to_a_terminal() -> None:
    shown = lines(hostile_forecast("[bold]x\x1b[2J"))
    assert "\x1b" not in "".join(shown)
    assert any("[bold]x" in line for line in shown)
