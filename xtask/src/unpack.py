"""Unpacks chosen members of one wheel: unpack.py WHEEL FOLDER MEMBER=PATH...

A MEMBER that ends in a slash stands for everything under it. Each mapping must match at least one file.
"""

import os
import shutil
import sys
import zipfile

wheel, folder = sys.argv[1:3]
mappings = [argument.split("=", 1) for argument in sys.argv[3:]]
matched = set()
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        for member, path in mappings:
            inside = member.endswith("/") and name.startswith(member)
            if name.endswith("/") or not (inside or name == member):
                continue
            matched.add(member)
            target = os.path.join(folder, path, name[len(member):]) if inside else os.path.join(folder, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with archive.open(name) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
missing = [member for member, _ in mappings if member not in matched]
if missing:
    sys.exit("%s has no %s" % (os.path.basename(wheel), ", ".join(missing)))
