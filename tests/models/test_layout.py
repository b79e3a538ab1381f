"""A pattern says which block stands where, and refuses what it cannot mean."""

from functools import partial

import pytest

from hybridlab.models.layout import check_names, expand, override, parts_by_place, sharing


def test_a_list_repeats_and_is_cut_to_the_number_of_layers():
    assert expand(["a", "b"], None, 5) == ["a", "b", "a", "b", "a"]
    assert expand(["a", "b"], None, None) == ["a", "b"]


def test_a_string_is_read_through_its_letters():
    letters = {"M": "ssm", "E": "moe", "*": "attn"}
    assert expand("MEM*", letters, None) == ["ssm", "moe", "ssm", "attn"]
    assert expand("ME*", letters, 4) == ["ssm", "moe", "attn", "ssm"]


@pytest.mark.parametrize(
    "pattern, letters, n_layers, said",
    [
        ("MX", {"M": "ssm"}, None, "['X']"),
        ("M", {"M": "ssm", "E": "moe"}, None, "['E']"),
        ("M", None, None, "letters"),
        (["ssm"], {"M": "ssm"}, None, "letters"),
        ([], None, None, "empty"),
        (["ssm"], None, 0, "n_layers=0"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(pattern, letters, n_layers, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[").replace("]", r"\]")):
        expand(pattern, letters, n_layers)


@pytest.mark.parametrize(
    "layout, blocks, said",
    [
        (["att"], ["attn"], "did you mean 'attn'"),
        (["attn"], ["attn", "ssm"], "ssm"),
        (["Attn"], ["Attn"], "a-z"),
    ],
)
def test_names_that_do_not_match_are_refused(layout, blocks, said):
    with pytest.raises(ValueError, match=said):
        check_names(layout, dict.fromkeys(blocks))


def make(d_model, *, width=1, inner=None):
    return d_model, width, inner and inner()


def inner(*, window):
    return {"window": window}


def test_overrides_reach_any_depth_of_one_place_only():
    block = partial(make, width=2, inner=partial(inner, window=8))
    parts = parts_by_place(["a", "a", "a"], {"a": block}, {1: {"inner": {"window": 64}}, 2: {"width": 3}})
    windows = [part(4)[2] for part in parts]
    assert windows == [{"window": 8}, {"window": 64}, {"window": 8}]
    assert [part(4)[1] for part in parts] == [2, 2, 3]


def test_a_mapping_of_parts_is_overridden_by_name():
    part = {"x": partial(make, width=1), "y": partial(make, width=2)}
    assert override(part, {"y": {"width": 5}}, "here")["y"](0)[1] == 5
    assert override(part, {"y": {"width": 5}}, "here")["x"](0)[1] == 1


@pytest.mark.parametrize(
    "places, said",
    [
        ({3: {"width": 1}}, "from 0 to 2"),
        ({-1: {"width": 1}}, "from 0 to 2"),
        ({0: {"widht": 1}}, "did you mean 'width'"),
        ({0: {"width": {"deep": 1}}}, "nothing here"),
    ],
)
def test_an_override_of_nothing_is_refused(places, said):
    with pytest.raises(ValueError, match=said):
        parts_by_place(["a"] * 3, {"a": partial(make, width=2)}, places)


def test_shared_places_point_to_the_first():
    assert sharing({"s": [3, 1]}, ["a", "b", "a", "b"]) == [0, 1, 2, 1]


@pytest.mark.parametrize("group", [[1], [0, 1], [1, 9], [-1, 1], [1, 1]])
def test_sharing_that_makes_no_sense_is_refused(group):
    with pytest.raises(ValueError, match="shared"):
        sharing({"s": group}, ["a", "b", "a", "b"])
