import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError, TraceError
from harness.workload.traces import ARTIFACT_FILTER, CLIENT_FILTER, length_statistics, list_traces, load_trace
from harness.workload.traces.builtin import BUILTIN
from harness.workload.traces.formats import FORMATS
from harness.workload.traces.histogram import TABLES, HistogramLengths
from harness.workload.traces.text import token_counter

ROOT = Path(__file__).parents[2]
TRACES_FOLDER = ROOT / "traces"
FIXTURES = TRACES_FOLDER / "fixtures"


def turn(speaker, tokens):
    return {"from": speaker, "value": "abcd" * tokens}


def draw(spec, n=400_000, seed=0):
    return load_trace(spec).sample(n, np.random.default_rng(seed))


class TestTables:
    @pytest.mark.parametrize("name", ["sharegpt", "azure_conv"])
    def test_samples_have_the_statistics_of_the_data(self, name):
        recorded = json.loads((TABLES / f"{name}.json").read_text())["statistics"]
        drawn = length_statistics(*draw(name.replace("_", "-"), 1_000_000))
        # A sample of a million knows a correlation to 0.001, which is more than 2 % of ShareGPT's 0.01.
        assert drawn.pop("correlation") == pytest.approx(recorded.pop("correlation"), rel=0.02, abs=0.004)
        assert drawn == pytest.approx(recorded, rel=0.02)

    @pytest.mark.parametrize("name", ["sharegpt", "azure_conv"])
    def test_the_table_itself_is_within_2_percent_even_in_correlation(self, name):
        table = json.loads((TABLES / f"{name}.json").read_text())
        assert table["table_statistics"] == pytest.approx(table["statistics"], rel=0.02)
        assert sum(count for *_, count in table["bins"]) == table["input"]["kept"]
        assert min(count for *_, count in table["bins"]) > 0

    def test_alpaca_keeps_the_published_means_after_the_filter(self):
        prompt, output = draw("alpaca", 1_000_000)
        assert ARTIFACT_FILTER.keeps(prompt, output).all()
        drawn = length_statistics(prompt, output)
        assert (drawn["mean_prompt"], drawn["mean_output"]) == pytest.approx((19, 58), rel=0.02)
        recorded = json.loads((TABLES / "alpaca.json").read_text())["statistics"]
        assert drawn == pytest.approx(recorded, rel=0.02, abs=0.004)

    @pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
    def test_the_clients_filter_holds_for_every_draw(self, name):
        assert CLIENT_FILTER.keeps(*draw(name)).all()

    def test_azure_is_not_filtered(self):
        prompt, _ = draw("azure-conv")
        assert prompt.max() > 4096

    @pytest.mark.parametrize("name", ["sharegpt", "sharegpt_opt", "sharegpt_messages", "alpaca", "azure_conv"])
    def test_every_file_states_where_it_comes_from(self, name):
        table = json.loads((TABLES / f"{name}.json").read_text())
        assert all(table[field] for field in ("description", "source", "licence", "statistics"))
        assert "filter" in table

    def test_filter_holds_in_a_bin_that_crosses_it(self):
        source = HistogramLengths(
            "crossing",
            lowest=np.array([[500, 500]]),
            highest=np.array([[1024, 2040]]),
            counts=np.array([1]),
            limits=ARTIFACT_FILTER,
        )
        prompt, output = source.sample(50_000, np.random.default_rng(0))
        assert ARTIFACT_FILTER.keeps(prompt, output).all()
        assert (prompt.min(), prompt.max()) == (500, 1024)
        assert (prompt + output).max() == 2048

    def test_manifest_names_url_licence_citation_and_hash_or_reason(self):
        for entry in json.loads((TRACES_FOLDER / "manifest.json").read_text())["data_sets"]:
            assert entry["url"].startswith("https://")
            assert entry["licence"]
            assert entry["citation"]
            assert len(entry["sha256"] or "") == 64 or entry["sha256_reason"]

    def test_build_script_recovers_the_statistics_of_what_it_reads(self, tmp_path):
        rng = np.random.default_rng(0)
        prompt, output = rng.integers(1, 1500, 5000), np.rint(rng.gamma(2, 150, 5000)).astype(int) + 1
        rows = "\n".join(f"{p},{o}" for p, o in zip(prompt, output, strict=True))
        raw = tmp_path / "raw.csv"
        raw.write_text(f"prompt_tokens,output_tokens\n{rows}\n")
        azure = tmp_path / "azure.csv"
        times = (f"2023-11-16 18:{i // 60:02}:{i % 60:02}.6805900" for i in range(500))
        rows = "\n".join(f"{time},{p},{o}" for time, p, o in zip(times, prompt, output, strict=False))
        azure.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}\n")
        script = str(ROOT / "tools/build_trace_tables.py")
        command = [sys.executable, script, "--sharegpt", str(raw), "--azure", str(azure), "--out", str(tmp_path)]
        subprocess.run(command, check=True, capture_output=True)
        first = (tmp_path / "sharegpt.json").read_bytes()
        table = json.loads(first)
        kept = CLIENT_FILTER.keeps(prompt, output)
        assert table["input"]["kept"] == kept.sum()
        assert table["statistics"] == pytest.approx(length_statistics(prompt[kept], output[kept]))
        drawn = HistogramLengths.from_table(table).sample(300_000, rng)
        assert CLIENT_FILTER.keeps(*drawn).all()
        assert drawn[0].mean() == pytest.approx(table["statistics"]["mean_prompt"], rel=0.02)
        unfiltered = json.loads((tmp_path / "azure_conv.json").read_text())
        assert (unfiltered["filter"], unfiltered["input"]["kept"]) == (None, 500)
        assert unfiltered["statistics"] == pytest.approx(length_statistics(prompt[:500], output[:500]))
        subprocess.run(command, check=True, capture_output=True)
        assert (tmp_path / "sharegpt.json").read_bytes() == first


class TestSynthetic:
    def test_fixed(self):
        assert [lengths.tolist() for lengths in draw("fixed", 2)] == [[128, 128], [64, 64]]
        assert [lengths.tolist() for lengths in draw("fixed:prompt=7,output=3", 2)] == [[7, 7], [3, 3]]

    def test_zipf_follows_the_power_law(self):
        prompt, output = draw("zipf:theta=1.5,min=10,max=100")
        for lengths in (prompt, output):
            assert (lengths.min(), lengths.max()) == (10, 100)
            assert (lengths == 10).sum() / (lengths == 40).sum() == pytest.approx(4**1.5, rel=0.1)
        assert abs(np.corrcoef(prompt, output)[0, 1]) < 0.01

    def test_zipf_theta_0_is_uniform(self):
        prompt, _ = draw("zipf:theta=0,min=1,max=9")
        assert prompt.mean() == pytest.approx(5, rel=0.01)

    @pytest.mark.parametrize("ratio", [0.25, 1, 256])
    def test_zipf_ratio_splits_the_sum(self, ratio):
        prompt, output = draw(f"zipf:min=1000,max=2000,ratio={ratio}")
        assert prompt.sum() / output.sum() == pytest.approx(ratio, rel=0.1)
        assert (prompt + output).min() == 1000
        assert output.min() >= 1

    def test_zipf_survives_an_extreme_theta(self):
        prompt, _ = draw("zipf:theta=500,min=1000,max=2000", 1000)
        assert (prompt >= 1000).all()
        assert prompt.mean() < 1010

    def test_bimodal_has_the_share_and_the_means_it_is_given(self):
        prompt, output = draw("bimodal:prompt=50,short=30,long=1000,share=0.8,cv=0.2")
        short = output < 200  # Both kinds are many standard deviations away from here.
        assert short.mean() == pytest.approx(0.8, abs=0.005)
        for kind, mean in ((short, 30), (~short, 1000)):
            assert output[kind].mean() == pytest.approx(mean, rel=0.01)
            assert output[kind].std() == pytest.approx(0.2 * mean, rel=0.02)
        assert prompt.mean() == pytest.approx(50, rel=0.01)
        assert (prompt == 1).mean() == pytest.approx(1 / 50, rel=0.05)
        assert abs(np.corrcoef(prompt, output)[0, 1]) < 0.01

    @pytest.mark.parametrize(("share", "mean"), [(1, 32), (0, 512)])
    def test_bimodal_of_one_kind(self, share, mean):
        _, output = draw(f"bimodal:share={share},cv=0.01")
        assert abs(output - mean).max() < 0.1 * mean

    def test_bimodal_lengths_are_whole_and_at_least_1(self):
        prompt, output = draw("bimodal:prompt=1,short=1,long=1,cv=100")
        assert (prompt == 1).all()
        assert (output.min(), output.dtype) == (1, np.int64)
        assert output.max() <= 1_000_000

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("bimodal:share=1.5", "share, the probability of a short answer, must be 0 to 1, not 1.5"),
            ("bimodal:share=-0.1", "not -0.1"),
            ("bimodal:prompt=0", "the mean prompt must be 1 to 1000000 tokens, not 0"),
            ("bimodal:short=0.5", "the mean short must be 1 to 1000000 tokens, not 0.5"),
            ("bimodal:long=2e6", "the mean long must be 1 to 1000000 tokens, not 2e+06"),
            ("bimodal:cv=0", "cv must be 0.001 to 100, not 0"),
            ("bimodal:mean=4", "valid options as key=value: prompt, short, long, share, cv"),
            ("zipf:theta=-1", "theta=-1"),
            ("zipf:min=0", "min=0"),
            ("zipf:min=9,max=8", "min=9, max=8"),
            ("zipf:ratio=1,min=1", "2 <= min"),
            ("zipf:min=1.5", "min must be an integer, not '1.5'"),
            ("zipf:mean=4", "valid options as key=value: theta, min, max, ratio"),
            ("fixed:prompt=0", "prompt must be 1 to"),
            ("azure-conv:x=1", "valid options as key=value: none"),
        ],
    )
    def test_bad_options(self, spec, message):
        with pytest.raises(ConfigError) as caught:
            load_trace(spec)
        assert message in str(caught.value)


@given(
    name=st.sampled_from(["sharegpt", "alpaca", "azure-conv", "zipf", "bimodal", "fixed"]), seed=st.integers(0, 2**32)
)
def test_a_longer_sample_begins_with_the_shorter(name, seed):
    short, long = draw(name, 20, seed), draw(name, 37, seed)
    for a, b in zip(short, long, strict=True):
        assert a.dtype == np.int64
        assert (a > 0).all()
        np.testing.assert_array_equal(a, b[:20])


class TestReaders:
    @pytest.mark.parametrize(
        ("kind", "file", "prompt", "output", "arrival"),
        [
            ("azure", "azure.csv", [350, 1200, 2, 4100], [40, 75, 300, 18], [0, 1.2499999, 1.5000002, 4.0]),
            ("burstgpt", "burstgpt.csv", [310, 850, 64, 1700], [25, 410, 12, 133], [0, 12, 12, 45]),
            ("mooncake", "mooncake.jsonl", [1500, 6200, 512], [120, 33, 480], [0, 0.75, 3]),
            ("bailian", "bailian.jsonl", [521, 830, 3120], [132, 48, 512], [0, 0.75, 41.25]),
            ("csv", "lengths.csv", [100, 200, 50, 800], [20, 10, 400, 60], [0, 0.5, 2, 4]),
        ],
    )
    def test_formats_with_lengths(self, kind, file, prompt, output, arrival):
        source = load_trace(f"{kind}:{FIXTURES / file}")
        assert source.prompt_tokens.tolist() == prompt
        assert source.output_tokens.tolist() == output
        assert (source.arrival_s - source.arrival_s[0]).tolist() == pytest.approx(arrival, abs=1e-9)
        assert "unfiltered" in source.description

    def test_csv_without_arrivals(self, tmp_path):
        path = tmp_path / "x.csv"
        path.write_bytes(b"\xef\xbb\xbfoutput_tokens,prompt_tokens\r\n5,6\r\n\r\n7,8\r\n")
        source = load_trace(f"csv:{path}")
        assert source.arrival_s is None
        assert source.prompt_tokens.tolist() == [6, 8]

    def test_azure_timestamps_of_2024_carry_a_time_zone(self, tmp_path):
        path = tmp_path / "x.csv"
        path.write_text(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2024-05-10 00:00:00.009930+00:00,5,6\n2024-05-10 00:00:01+00:00,5,6\n"
        )
        assert np.diff(load_trace(f"azure:{path}").arrival_s).tolist() == pytest.approx([0.99007])

    def test_sharegpt_takes_the_first_human_turn_and_its_answer(self):
        source = load_trace(f"sharegpt:{FIXTURES / 'sharegpt.json'}")
        records = json.loads((FIXTURES / "sharegpt.json").read_text())
        records = [*records[:2], records[4]]  # The last has a prompt of one token, which an answer makes up for.
        turns = [[len(turn["value"].encode()) for turn in record["conversations"][:2]] for record in records]
        assert source.prompt_tokens.tolist() == [-(-human // 4) for human, _ in turns]
        assert source.output_tokens.tolist() == [-(-gpt // 4) for _, gpt in turns]
        assert "3 of 5 records" in source.description
        assert "APPROXIMATED as UTF-8 bytes / 4" in source.description

    @pytest.mark.parametrize(
        ("record", "prompt"),
        [
            ({"conversations": [turn("human", 8), turn("gpt", 6)]}, 8),
            ({"conversations": [turn("user", 8), turn("assistant", 6)]}, 8),
            (
                {"conversations": [{"role": "user", "content": "ab" * 16}, {"role": "assistant", "content": "c" * 24}]},
                8,
            ),
            ({"messages": [{"role": "user", "content": "ab" * 16}, {"role": "assistant", "content": "c" * 24}]}, 8),
            # The system prompt, a line break, and the question.
            ({"conversations": [turn("system", 5), turn("user", 8), turn("assistant", 6)]}, 14),
            ({"conversations": [turn("assistant", 8), turn("user", 6)]}, None),
            ({"conversations": [turn("user", 8), turn("system", 5), turn("assistant", 6)]}, None),
            ({"conversations": [turn("system", 5), turn("user", 8)]}, None),
        ],
    )
    def test_sharegpt_knows_the_roles_that_files_have(self, record, prompt, tmp_path):
        path = tmp_path / "x.json"
        path.write_text(json.dumps([record, {"conversations": [turn("human", 50), turn("gpt", 50)]}]))
        source = load_trace(f"sharegpt:{path}")
        assert source.prompt_tokens.tolist() == [*([prompt] if prompt else []), 50]
        assert source.output_tokens.tolist() == [*([6] if prompt else []), 50]

    def test_alpaca_joins_instruction_and_input_and_keeps_an_answer_of_one_token(self, tmp_path):
        source = load_trace(f"alpaca:{FIXTURES / 'alpaca.json'}")
        assert source.prompt_tokens.tolist() == [-(-(35 + 1 + 25) // 4), 10, 6]
        assert source.output_tokens.tolist() == [8, 15, 1]
        assert "3 of 3 records" in source.description
        records = json.loads((FIXTURES / "alpaca.json").read_text())
        records[1].update(instruction="Why?", output="Because.")
        records[2].update(output="")
        path = tmp_path / "short.json"
        path.write_text(json.dumps(records))
        assert "1 of 3 records" in load_trace(f"alpaca:{path}").description

    def test_real_tokenizer(self, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
        path = FIXTURES / "alpaca.json"
        in_spec = load_trace(f"alpaca:{path},tokenizer={tmp_path}")
        assert in_spec.prompt_tokens.tolist() == [11, 8, 5]
        assert in_spec.output_tokens.tolist() == [6, 12, 1]
        assert f"tokens counted with {tmp_path}" in in_spec.description
        assert load_trace(f"alpaca:{path}", str(tmp_path)).prompt_tokens.tolist() == [11, 8, 5]

    def test_tokenizer_errors(self, tmp_path):
        with pytest.raises(ConfigError, match="'/nowhere' is not a directory"):
            load_trace(f"alpaca:{FIXTURES / 'alpaca.json'},tokenizer=/nowhere")
        with pytest.raises(ConfigError, match="could not be loaded"):
            token_counter(str(tmp_path))
        with pytest.raises(ConfigError, match="a tokenizer does not apply"):
            load_trace(f"csv:{FIXTURES / 'lengths.csv'},tokenizer={tmp_path}")

    def test_approximation_counts_bytes_and_survives_lone_surrogates(self):
        assert token_counter(None).count(["", "abcd", "abcde", "日本", "\ud800"]).tolist() == [0, 1, 2, 2, 1]


AZURE, BURST, PLAIN = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n",
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n",
    "prompt_tokens,output_tokens,arrival_s\n",
)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            "csv",
            "",
            ", line 1: no column prompt_tokens, output_tokens; expected prompt_tokens, output_tokens, the file is",
        ),
        ("csv", PLAIN, ": no requests in it"),
        (
            "csv",
            "prompt,output_tokens\n",
            "no column prompt_tokens; expected prompt_tokens, output_tokens, found prompt,",
        ),
        ("csv", PLAIN + "5,6,0\n0,6,1\n", ", line 3: prompt_tokens must be a positive integer, not '0'"),
        ("csv", PLAIN + "5,-6,0\n", ", line 2: output_tokens must be a positive integer, not '-6'"),
        ("csv", PLAIN + "5.5,6,0\n", ", line 2: prompt_tokens must be a positive integer, not '5.5'"),
        ("csv", PLAIN + "1_0,6,0\n", "not '1_0'"),
        ("csv", PLAIN + "99999999999,6,0\n", "not '99999999999'"),
        ("csv", PLAIN + "5\n", ", line 2: arrival_s must be a number of seconds, not nothing"),
        ("csv", PLAIN + "5,6,inf\n", ", line 2: arrival_s must be a number of seconds, not 'inf'"),
        ("csv", PLAIN + "1,024,6,0\n", ", line 2: more fields than the 3 columns"),
        (
            "azure",
            AZURE + "yesterday,5,6\n",
            ", line 2: TIMESTAMP must look like 2023-11-16 18:15:46.6805900, not 'yest",
        ),
        ("azure", AZURE + "2023-11-16 18:15:46.68x,5,6\n", ", line 2: TIMESTAMP must look like"),
        (
            "azure",
            AZURE + "2023-11-16 18:15:46.6805900,5,\n",
            ", line 2: GeneratedTokens must be a positive integer, not ''",
        ),
        ("burstgpt", BURST + "5,GPT-4,9,0,9,API log\n", ", line 2: 0 Response tokens marks a request that failed"),
        ("burstgpt", BURST + "x,GPT-4,9,1,10,API log\n", ", line 2: Timestamp must be a number of seconds, not 'x'"),
        ("mooncake", "", ": no requests in it"),
        ("mooncake", '\n{"timestamp": 0\n', ", line 2: expected a JSON object, found '{\"timestamp\": 0'"),
        ("mooncake", "[1]\n", ", line 1: expected an object with 'timestamp', found [1]"),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 3}\n',
            ", line 1: no 'output_length'; it has timestamp, input_length",
        ),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 3.5, "output_length": 1}\n',
            "input_length must be a positive integer, not 3.5",
        ),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": true, "output_length": 1}\n',
            "input_length must be a positive integer, not True",
        ),
        (
            "mooncake",
            '{"timestamp": null, "input_length": 3, "output_length": 1}\n',
            "timestamp must be a whole number of milliseconds, not nothing",
        ),
        (
            "mooncake",
            '{"timestamp": 61.114, "input_length": 3, "output_length": 1}\n',
            "timestamp must be a whole number of milliseconds, not 61.114; files with seconds are read as bailian:PATH",
        ),
        (
            "mooncake",
            '{"chat_id": 1, "timestamp": 61, "input_length": 3, "output_length": 1}\n',
            ", line 1: 'chat_id' belongs to bailian files, whose timestamp is in seconds, not milliseconds; read it as",
        ),
        (
            "bailian",
            '{"timestamp": 61, "input_length": 3, "output_length": 1}\n',
            ", line 1: no 'chat_id'; it has timestamp, input_length, output_length; a file with these is read as "
            "mooncake:PATH",
        ),
        ("csv", AZURE + "x,5,6\n", "GeneratedTokens; a file with these is read as azure:PATH"),
        ("sharegpt", "", ", line 1: not JSON"),
        ("sharegpt", '[{"id": 1},\n}]', ", line 2: not JSON"),
        ("sharegpt", "[]", ": expected a JSON list of at least one record, found []"),
        ("sharegpt", '{"conversations": []}', ": expected a JSON list of at least one record, found {"),
        (
            "sharegpt",
            '[{"conversations": []}, 7]',
            ", record 1 (from 0): expected an object with 'conversations', found 7",
        ),
        ("sharegpt", '[{"turns": []}]', ", record 0 (from 0): no 'conversations'; it has turns"),
        (
            "sharegpt",
            '[{"conversations": "hi"}]',
            ", record 0 (from 0): conversations must be a list of turns, not 'hi'",
        ),
        ("sharegpt", '[{"conversations": [{"from": "human"}]}]', ", record 0 (from 0): no 'value'; it has from"),
        ("sharegpt", '[{"conversations": [{"from": "human", "value": 3}]}]', "value must be a text, not 3"),
        ("sharegpt", '[{"conversations": []}]', ": none of its 1 records is a prompt with an answer that passes"),
        (
            "alpaca",
            '[{"instruction": "a", "input": ""}]',
            ", record 0 (from 0): no 'output'; it has instruction, input",
        ),
        ("alpaca", '[{"instruction": "a", "input": null, "output": "b"}]', "input must be a text, not nothing"),
    ],
)
def test_malformed_file_is_named_with_its_line_or_record(kind, text, message, tmp_path):
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(TraceError) as caught:
        load_trace(f"{kind}:{path}")
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_an_error_stays_short_whatever_the_file_is(tmp_path):
    path = tmp_path / "other"
    path.write_text(json.dumps({"timestamp": 0, "text": "x" * 5000, "hash_ids": list(range(9000))}) + "\n")
    for kind in FORMATS:
        with pytest.raises(TraceError) as caught:
            load_trace(f"{kind}:{path}")
        assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("kind", ["sharegpt", "alpaca", *FORMATS])
def test_unreadable_files(kind, tmp_path):
    with pytest.raises(TraceError, match="/nowhere/x: no such file"):
        load_trace(f"{kind}:/nowhere/x")
    with pytest.raises(TraceError, match="Is a directory"):
        load_trace(f"{kind}:{tmp_path}")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TraceError, match="not text in UTF-8"):
        load_trace(f"{kind}:{binary}")
    with pytest.raises(ConfigError, match="path must follow"):
        load_trace(f"{kind}:")


@pytest.mark.parametrize("spec", ["sharegtp", "parquet:x", "x.csv", ""])
def test_unknown_trace_names_the_valid_ones(spec):
    with pytest.raises(ConfigError) as caught:
        load_trace(spec)
    for name in (repr(spec), *BUILTIN, "azure:PATH", "mooncake:PATH"):
        assert name in str(caught.value)


def test_missing_table_is_a_trace_error(monkeypatch):
    monkeypatch.setattr("harness.workload.traces.histogram.TABLES", Path("/nowhere"))
    with pytest.raises(TraceError, match=r"/nowhere/sharegpt\.json"):
        load_trace("sharegpt")


def test_list_traces_covers_what_load_trace_takes():
    names = [name for name, _ in list_traces()]
    assert [name.split("[")[0].split(":")[0] for name in names] == [
        *(
            "sharegpt",
            "sharegpt-opt",
            "sharegpt-client",
            "alpaca",
            "azure-conv",
            "zipf",
            "bimodal",
            "fixed",
            "measured",
        ),
        *("sharegpt", "alpaca", "azure", "burstgpt", "mooncake", "bailian", "csv"),
    ]
    assert all(description for _, description in list_traces())


def test_filter_bounds_are_inclusive():
    prompt, output = np.array([4, 3, 4, 1024, 1025, 1024]), np.array([4, 4, 3, 1024, 4, 1025])
    assert CLIENT_FILTER.keeps(prompt, output).tolist() == [True, False, False, True, False, False]
    assert ARTIFACT_FILTER.keeps(prompt, output).tolist() == [True, True, True, True, False, False]


def test_the_artifacts_filter_drops_a_request_only_if_both_lengths_are_short_or_one_is_empty():
    prompt, output = np.array([3, 3, 100, 1, 100, 0]), np.array([3, 4, 1, 100, 0, 100])
    assert ARTIFACT_FILTER.keeps(prompt, output).tolist() == [False, True, True, True, False, False]
    assert not CLIENT_FILTER.keeps(prompt, output).any()


def test_zipf_lengths_of_a_ratio_are_tied_or_independent_with_the_same_marginals() -> None:
    spec = "zipf:theta=1.0,min=16,max=2048,ratio=4"
    tied, free = (load_trace(each).sample(50_000, np.random.default_rng(0)) for each in (spec, f"{spec},independent=1"))
    assert (tied[0] + tied[1]).max() <= 2048
    assert np.corrcoef(tied)[0, 1] > 0.99
    assert abs(np.corrcoef(free)[0, 1]) < 0.02
    for own, other in zip(tied, free, strict=True):
        assert own.mean() == pytest.approx(other.mean(), rel=0.02)
        assert other.min() >= 1
