"""x"""


async def assert_isolated() -> None:
    """x"""
