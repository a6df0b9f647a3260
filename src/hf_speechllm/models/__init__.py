"""The exported room: flat files that travel to the Hub as remote code, importing nothing of ours from outside."""
