from pipeline.evaluation.tables import comparison, mean

REFERENCES = {"bits_per_character": {"bz2": 1.863}, "tfidf": {"accuracy": 0.79, "macro_f1": 0.7, "majority": 0.4}}


def cell(bpc, accuracy, **more):
    return {
        "pretrain": {"test": {"bpc": bpc} | more, "parameters": 2_000_000, "flops_per_token": 2e6},
        "warmup": {"before": {"bpc": 2.0}, "after": {"bpc": 1.9}},
        "finetune": {"test": {"accuracy": accuracy, "macro_f1": 0.5}, "flops_per_token": 1e6},
        "robustness": {
            "warmed-up": {"degradation": 0.5},
            "classifier": {"degradation": 0.1, "consistency": 0.9},
        },
    }


def by_stage(*entries):
    return {stage: [entry[stage] for entry in entries] for stage in entries[0]}


def test_mean_over_seeds_shows_its_spread():
    assert mean([1.5], 2) == "1.50"
    assert mean([0.5, 0.7], 1, 100) == "60.0 +/- 14.1"


def test_a_row_per_measure_a_column_per_method_and_blanks_where_a_measure_does_not_apply():
    table = comparison(
        {"vqmoe": by_stage(cell(1.6, 0.5, bpc_discrete=1.7), cell(1.8, 0.5, bpc_discrete=1.9)), "smoe": by_stage(cell(1.5, 0.6))},
        REFERENCES,
    )
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.heads == ("measure", "vqmoe", "smoe", "to compare with")
    assert rows["test bits per character"] == ("1.700 +/- 0.141", "1.500", "bz2 1.863")
    assert rows["- discrete path alone"][:2] == ("1.800 +/- 0.141", "")
    assert rows["test accuracy %"] == ("50.0 +/- 0.0", "60.0", "TF-IDF 79.0")
    assert rows["experts unchanged by noise %"][:2] == ("90.0 +/- 0.0", "90.0")
    # No entry has these.
    assert "codebook utilisation %" not in rows
    assert "- accuracy without pre-training %" not in rows
    assert "test perplexity" not in rows
    assert all(len(row) == len(table.heads) for row in table.rows)
    assert table.markdown().count("\n") == len(table.rows) + 3


def test_rows_are_those_of_the_unit_there_is():
    words = cell(0, 0.5)
    words["pretrain"]["test"] = {"perplexity": 31.236, "perplexity_discrete": 40.0}
    words["warmup"] = {"before": {"perplexity": 50.0}, "after": {"perplexity": 45.0}}
    words["pretrain"]["test"] |= {"perplexity_router": 60.0}
    rows = comparison({"vqmoe": by_stage(words)}, REFERENCES | {"perplexity": {"unigram": 950.2}}).rows
    assert rows[:5] == [
        ("test perplexity", "31.24", "unigram 950"),
        ("- discrete path alone", "40.00", ""),
        ("- router's top-k experts alone", "60.00", ""),
        ("valid perplexity of the task, before warm-up", "50.00", "mode of inference"),
        ("- after warm-up", "45.00", "mode of inference"),
    ]
    assert not any("per character" in row[0] for row in rows)
