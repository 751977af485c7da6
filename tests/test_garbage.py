import gc

import pytest

from cxa_jax.garbage import keeping_garbage


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_rests_inside_and_is_as_before_behind_an_error(was_enabled):
    try:
        gc.enable() if was_enabled else gc.disable()
        with pytest.raises(ValueError), keeping_garbage():
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
