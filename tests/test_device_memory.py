"""A device that runs out of memory names what was tried."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxa_jax.device_memory import naming_exhaustion
from cxa_jax.errors import UserError


def test_a_full_device_is_named_with_the_cure():
    """A petabyte, asked of the real backend."""
    with pytest.raises(UserError, match=r"out of memory with config\.x=3: less\n  \(RESOURCE_EXHAUSTED"):
        with naming_exhaustion("config.x=3", "less"):
            jax.block_until_ready(jax.jit(lambda: jnp.ones((2**48,)))())


def test_a_full_host_is_named_with_the_cure():
    with pytest.raises(UserError, match=r"the host ran out of memory with config\.x=3: less"):
        with naming_exhaustion("config.x=3", "less"):
            np.empty(2**55)


def test_other_errors_of_the_backend_pass():
    def fail():
        raise ValueError("host")

    with pytest.raises(Exception, match="host") as caught, naming_exhaustion("", ""):
        jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32)).block_until_ready()
    assert not isinstance(caught.value, UserError)
