"""``sae-core pretrained``: find, look at, fetch, check and share published SAEs. One module for each pair of actions."""

from __future__ import annotations

import argparse
from typing import ClassVar, final

__all__ = ["Pretrained"]

_CATALOGUE = "a YAML or TOML file with releases of your own; may be given more than once"


@final
class Pretrained:
    """The command and its actions."""

    help: ClassVar[str] = "Find, show, download, verify and upload published SAEs."

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the actions."""
        actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)

        listing = actions.add_parser("list", help="releases, and what they are for", allow_abbrev=False)
        listing.add_argument("--model", help="only releases for this base model; a part of its name is enough")
        listing.add_argument("--layer", type=int, help="only SAEs of this layer")
        listing.add_argument("--format", help="only releases in this file format")
        listing.add_argument("--search", metavar="TEXT", help="only releases with TEXT in name, model or repository")

        show = actions.add_parser("show", help="a release and its SAEs, or one SAE and its config", allow_abbrev=False)
        show.add_argument("release", help="a release, or a Hub repository owner/name[@revision]")
        show.add_argument("sae_id", nargs="?", metavar="ID", help="one SAE; its config is read without its weights")
        show.add_argument("--no-fetch", action="store_true", help="only what the catalogue says, without the network")

        download = actions.add_parser("download", help="fetch an SAE, and check that it loads", allow_abbrev=False)
        download.add_argument("release", help="a release, or a Hub repository owner/name[@revision]")
        download.add_argument(
            "sae_id", metavar="ID", help="the SAE: an id of the release, or a folder of the repository"
        )
        download.add_argument("--output", metavar="DIR", help="also write it there, in sae-core's own format")
        download.add_argument("--dtype", help="precision of what --output writes; the file's by default")
        download.add_argument("--revision", help="a commit, branch or tag of its repository")
        download.add_argument("--refresh", action="store_true", help="ask the Hub whether the branch has moved on")

        verify = actions.add_parser("verify", help="check a local copy: checksums, config, tensors", allow_abbrev=False)
        verify.add_argument(
            "target", metavar="PATH", help="a folder or file with an SAE; or a release, followed by an id"
        )
        verify.add_argument("sae_id", nargs="?", metavar="ID", help="check the cached copy of this SAE of a release")
        verify.add_argument("--format", help="the file format, if it is not to be recognised by the files")

        upload = actions.add_parser("upload", help="share SAEs on the Hub", allow_abbrev=False)
        upload.add_argument("path", metavar="PATH", help="a folder that `sae.save` wrote, or one that holds several")
        upload.add_argument("repository", metavar="REPO", help="owner/name; made if it does not exist")
        upload.add_argument(
            "--id", dest="sae_id", help="the SAE's id, which becomes its folder; by default PATH's name"
        )
        upload.add_argument("--revision", default="main", metavar="BRANCH", help="the branch to write to (main)")
        upload.add_argument("--private", action="store_true", help="if the repository is made, make it private")
        upload.add_argument("--force", action="store_true", help="replace files that are there with other content")
        upload.add_argument("--dry-run", action="store_true", help="only show what would be sent")

        for action in (listing, show, download, verify, upload):
            action.add_argument("--json", action="store_true", help="print JSON")
        for action in (listing, show, download, verify):
            action.add_argument("--catalogue", metavar="FILE", action="append", default=[], help=_CATALOGUE)

    def run(self, args: argparse.Namespace) -> int:
        """Run one action."""
        from sae_pretrained.cli import browse, fetch, share

        actions = {
            "list": browse.list_releases,
            "show": browse.show,
            "download": fetch.download,
            "verify": fetch.verify,
            "upload": share.upload,
        }
        return actions[args.action](args)
