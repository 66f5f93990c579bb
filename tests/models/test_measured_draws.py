"""The newest draws whose features were measured, and what they lack."""

import pytest
import torch

from cp2image.models import measured_draws
from cp2image.models.measured_draws import MeasuredDraws


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(measured_draws, "_KEPT", 5)
    return MeasuredDraws((2, 3, 3), 4, torch.device("cpu"))


def numbered(*numbers):
    """Draws whose latents and features all are their number, as they were asked for."""
    values = torch.tensor(numbers, dtype=torch.float32)
    features = values.view(-1, 1).expand(-1, 4)
    return values.view(-1, 1, 1, 1).expand(-1, 2, 3, 3), features, features


def everything(kept):
    """The numbers of all that is ever picked."""
    latents, features = kept.pick(len(kept), torch.Generator().manual_seed(0))
    found = set()
    for seed in range(40):
        latents, features = kept.pick(len(kept), torch.Generator().manual_seed(seed))
        assert torch.equal(latents[:, 0, 0, 0], features[:, 0])
        found |= {int(number) for number in features[:, 0]}
    return found


def test_the_newest_take_the_places_of_the_oldest(kept):
    kept.add(*numbered(1, 2, 3))
    assert (len(kept), everything(kept)) == (3, {1, 2, 3})
    kept.add(*numbered(4, 5, 6, 7))
    assert (len(kept), everything(kept)) == (5, {3, 4, 5, 6, 7})
    kept.add(*numbered())
    assert everything(kept) == {3, 4, 5, 6, 7}


def test_none_are_picked_while_there_are_fewer_than_wanted(kept):
    random = torch.Generator().manual_seed(0)
    kept.add(*numbered(1, 2))
    latents, features = kept.pick(3, random)
    assert (latents.shape, features.shape) == ((0, 2, 3, 3), (0, 4))
    assert len(kept.pick(2, random)[0]) == 2


def test_what_is_forgotten_is_never_picked(kept):
    kept.add(*numbered(1, 2, 3))
    kept.forget()
    assert len(kept) == 0
    kept.add(*numbered(8))
    assert everything(kept) == {8}


def test_the_state_goes_on_where_it_was(kept):
    kept.add(*numbered(1, 2, 3, 4, 5))
    other = MeasuredDraws((2, 3, 3), 4, torch.device("cpu"))
    latents, features, asked = numbered(6)
    kept.add(latents, features, asked + 1)
    other.load_state({name: value.clone() for name, value in kept.state().items()})
    latents, features, asked = numbered(7)
    for one in (kept, other):
        one.add(latents, features, asked + 1)
        assert one.correction.tolist() == pytest.approx([2 * measured_draws._RATE] * 4)
    picks = [one.pick(5, torch.Generator().manual_seed(3)) for one in (kept, other)]
    assert all(torch.equal(a, b) for a, b in zip(*picks, strict=True))
    assert everything(other) == {3, 4, 5, 6, 7}


def test_the_correction_grows_by_what_each_draw_lacks_and_within_limits(kept):
    latents, asked, _ = numbered(1, 2)
    kept.add(latents, torch.tensor([[1.0, 3, 2, -1e6], [2.0, 3, 2, -1e6]]), asked)
    expected = [0.0, measured_draws._RATE * (-2 - 1), measured_draws._RATE * (-1 + 0), 0.5]
    torch.testing.assert_close(kept.correction, torch.tensor(expected))
    kept.add(*numbered())
    torch.testing.assert_close(kept.correction, torch.tensor(expected))
    kept.forget()
    assert (kept.correction == 0).all()


def test_asked_for_beyond_the_features_draws_have_them_on_average(kept):
    """Draws of which a feature is always 0.2 too small, and follow what is asked by half only."""
    torch.manual_seed(0)
    latents = torch.zeros(16, 2, 3, 3)
    for _ in range(2500):
        asked = torch.randn(16, 4)
        drawn = 0.5 * (asked + kept.correction) - 0.1 + 0.3 * torch.randn(16, 4)
        kept.add(latents, drawn, asked)
    torch.testing.assert_close(kept.correction, torch.full((4,), 0.2), rtol=0, atol=0.06)
