module plumbline.dev/tests/cluster/coredns

go 1.24.0
