"""Pages for people: plain HTML, nothing from another origin, one shared style sheet."""
