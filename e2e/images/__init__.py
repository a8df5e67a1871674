"""Penstock's three images, built from their Dockerfiles as a user builds them.

base       the Python image below them, made from Debian's packages
buildah    the builder, with its storage in the cache
build      the images of this tree
"""
