module plumbline.dev/tests/cluster/helm

go 1.24.0
