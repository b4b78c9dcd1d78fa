class FirstCommand:
    """Says a word."""

    help = "Say a word."

    def configure(self, parser):
        parser.add_argument("word", help="the word")

    def run(self, args):
        print(args.word)
        return 0
