"""As much of curl as the documents use, for machines without it: curl [-s] [-N] URL [-d BODY]."""

from __future__ import annotations

import argparse
import sys
import urllib.request


def main() -> None:
    parser = argparse.ArgumentParser(prog="curl")
    parser.add_argument("url")
    parser.add_argument("-s", action="store_true")
    parser.add_argument("-N", action="store_true")
    parser.add_argument("-d", dest="body")
    options = parser.parse_args()
    url = options.url if "://" in options.url else f"http://{options.url}"
    with urllib.request.urlopen(url, options.body.encode() if options.body else None) as response:
        for line in response:
            sys.stdout.write(line.decode())
            sys.stdout.flush()


if __name__ == "__main__":
    main()
