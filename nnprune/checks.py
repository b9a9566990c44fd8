"""Checks of settings that several groups share."""


def check_count(key: str, value: object, least: int) -> None:
    """Raise ValueError when `value` of a config's `key` is no whole number, or below `least`."""
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{key}={value}: must be a whole number, at least {least}")
