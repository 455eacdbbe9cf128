"""Text from somebody else's program, made harmless to look at."""


def visible(text: str) -> str:
    r"""`text` with all that a terminal would obey and not show written out, as `\x1b` or `\u202e`.

    That is control characters (line ends and escape sequences among them), marks that turn the direction of writing,
    characters of no width, and what is not valid text. Letters of every script stay.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
