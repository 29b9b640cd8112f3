"""What all tests share."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ours",
    deadline=None,  # how long an example takes tells of the machine that runs it, and of what else that does
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,  # the examples of a test may share its folder
    ],
)
settings.load_profile("ours")
