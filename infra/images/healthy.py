"""Exit with 0 if an address answers: `healthy.py URL [STATUS ...]`, with one of these, or 200."""

import sys
import urllib.error
import urllib.request


def main(url: str, *statuses: str) -> int:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=4) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    if status in {int(text) for text in statuses or ("200",)}:
        return 0
    print(f"{url}: status {status}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
