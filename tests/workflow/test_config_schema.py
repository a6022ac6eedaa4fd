import copy
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from fastserve.errors import ConfigError
from harness.points import check_experiment

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SCHEMA = yaml.safe_load((WORKFLOWS / "schemas" / "config.schema.yaml").read_text(encoding="utf-8"))
CONFIGS = ["default", "smoke"]


def load(name):
    return yaml.safe_load((WORKFLOWS / "config" / f"{name}.yaml").read_text(encoding="utf-8"))


def errors(config):
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(config)]


def filled(experiment):
    """The defaults the pipeline fills in, as far as the check needs them."""
    series = [{"settings": {}, **each} for each in experiment["series"]]
    return {"settings": {}, **experiment, "series": series}


def edited(*path, to):
    config = load("smoke")
    place = config["experiments"]
    for key in path[:-1]:
        place = place[key]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return config


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configurations_are_valid(name):
    config = load(name)
    assert errors(config) == []
    for experiment, definition in config["experiments"].items():
        check_experiment(experiment, filled(definition))


def test_the_papers_points_of_figure_11a_are_those_run():
    points = load("default")["experiments"]["fig11-opt-13b-sharegpt"]["points"]
    reported = (WORKFLOWS / "data" / "reported_points.csv").read_text(encoding="utf-8").splitlines()
    assert len(reported) == 586
    of_fastserve = [line.split(",") for line in reported if line.startswith("fig11,a,sharegpt,opt-13b,")]
    rates = [float(line[6]) for line in of_fastserve if line[5] == "FastServe"]
    assert [point["rate"] for point in points] == rates
    assert [point["num_requests"] for point in points] == [20, 50, 100, 200, 300, 350] + [400] * 10


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("sim", "sedes"), [0], "'sedes' was unexpected"),
        (("sim", "series", 0, "polisy"), "vllm", "'polisy' was unexpected"),
        (("sim", "points", 0, "requests"), 3, "'requests' was unexpected"),
        (("sim", "paper", "colour"), "red", "'colour' was unexpected"),
        (("engine", "engine", "modle"), "opt-tiny", "'modle' was unexpected"),
        (("sim", "kind"), "simulation", "is not one of"),
        (("sim", "seeds"), [0, 0], "non-unique"),
        (("sim", "seeds"), [], "non-empty"),
        (("sim", "seeds"), [-1], "minimum"),
        (("sim", "seeds"), 0, "not of type 'array'"),
        (("sim", "slo"), 0, "minimum"),
        (("sim", "slo"), "0.3", "not of type"),
        (("sim", "metric"), "mean_latency", "does not match"),
        (("sim", "points", 0, "rate"), "fast", "not of type 'number'"),
        (("sim", "points", 0, "rate"), 0, "minimum"),
        (("sim", "points", 0, "num_requests"), 1.5, "not of type 'integer'"),
        (("sim", "points", 0, "num_requests"), True, "not of type 'integer'"),
        (("sim", "series", 0, "name"), "Up/down", "does not match"),
        (("sim", "series", 0, "variant"), "yes", "not of type 'boolean'"),
        (("sim", "series", 0, "profile"), None, "'profile' is a required property"),
        (("sim", "trace"), None, "'trace' is a required property"),
        (("sim", "engine"), {"model": "opt-tiny"}, "should not be valid"),
        (("engine", "engine"), None, "'engine' is a required property"),
        (("smoke",), {}, "smoke"),
    ],
)
def test_typos_and_wrong_types_are_refused(path, to, message):
    found = errors(edited(*path, to=to))
    assert any(message in error for error in found), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["series"][2].update(policy="fastsrve"), "unknown policy 'fastsrve'"),
        (lambda e: e["series"][2].update(settings={"alfa_s": 1}), "unknown option 'alfa_s'"),
        (lambda e: e["series"][2].update(settings={"alpha_s": "soon"}), "alpha_s"),
        (lambda e: e["series"][2].update(profile="a100-80g/opt-13"), "a100-80g/opt-13"),
        (lambda e: e["series"][2].update(name="vllm"), "series must differ, 'vllm' is there twice"),
        (lambda e: e["points"].append({"rate": 4.0, "num_requests": 9}), "rates must differ, '4' is there twice"),
    ],
)
def test_what_the_schema_cannot_see_is_refused_before_any_work(change, message):
    experiment = copy.deepcopy(load("smoke")["experiments"]["sim"])
    change(experiment)
    with pytest.raises(ConfigError, match=r"experiment 'sim'") as refused:
        check_experiment("sim", filled(experiment))
    assert message in str(refused.value)
