"""Every image: where it comes from, how it is decoded and cut, and the batches that training and evaluation get.

open          `open_data`: training and test images of a name, and the loaders over them
collection    a folder, a tar, shards or the digits, as sets of labelled images
labels/       soft labels of a teacher, stored once and learned from
"""
