"""Pages for people: plain HTML without scripts of its own, nothing from another origin, one shared style sheet."""
