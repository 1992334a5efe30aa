from benchmarks import growth


def test_prepare_is_timed_in_a_process_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(growth, "MEGABYTES", (1,))
    found = growth.corpus(0)
    assert found.keys() == {"1 MB as bytes", "1 MB as words"}
    printed = capsys.readouterr().out.splitlines()
    for name, row in found.items():
        assert row["seconds"] > 0 and 50 < row["mib"] < 4000
        assert f"{row['seconds']:.1f} s" in next(line for line in printed if line.startswith(name))


def test_ratios_are_to_the_first(capsys):
    found = growth._ratios({"one": lambda: sum(range(20_000)), "ten": lambda: sum(range(400_000))}, 6)
    assert found["one"]["median"] == 1 and found["ten"]["median"] > 4
