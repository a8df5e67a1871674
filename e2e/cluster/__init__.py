"""A real Kubernetes cluster on one machine: nodes are network namespaces.

    settings     where things are, addresses          cache        what is built once a machine
    programs     from Debian, or built from Go        oci          images as folders of blobs
    cgroups      what belongs to the cluster          network      namespaces, bridge, routes
    identity     certificates, tokens, kubeconfigs    process      one started program
    control      etcd, API server and so on, DNS      node         containerd, kubelet, kube-proxy
    containerd   its folders and images               images       what nodes start with
    kubectl      as administrator                     cluster      all of it, up and down

Run `python -m e2e.cluster --help` for the commands.
"""
