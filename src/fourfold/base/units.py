"""Units and how numbers are printed. GiB is 2**30 bytes; GB is used only for links."""

GIB = 2**30
MIB = 2**20


def format_bytes(num_bytes: float) -> str:
    """Bytes as GiB, MiB or KiB with two decimals, e.g. `1.50 GiB`."""
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    if num_bytes >= MIB:
        return f"{num_bytes / MIB:.2f} MiB"
    return f"{num_bytes / 1024:.2f} KiB"


def format_duration(seconds: float) -> str:
    """Seconds as `h:mm:ss`, rounded down."""
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}"


def format_count(number: int) -> str:
    """An integer with thousands separators, e.g. `134,515,008`."""
    return f"{number:,}"
