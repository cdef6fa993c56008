{{/* Values that pass the schema one by one and cannot work together. Each ends the render with the reason. */}}
{{- define "quire.check" -}}
{{- include "quire.checkNames" . -}}
{{- include "quire.checkReplicas" . -}}
{{- include "quire.checkGpu" . -}}
{{- include "quire.checkSingle" . -}}
{{- include "quire.checkModel" . -}}
{{- include "quire.checkScheduling" . -}}
{{- include "quire.checkTenants" . -}}
{{- include "quire.checkMetrics" . -}}
{{- end }}

{{- define "quire.checkNames" -}}
{{- $full := include "quire.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) -}}
{{- fail (printf "%s, from the release's name, cannot begin the name of a Service, which takes lower-case letters, digits and dashes and begins with a letter: set fullnameOverride" $full) -}}
{{- end -}}
{{- if and .Values.serviceAccount.create (eq .Values.serviceAccount.name "default") -}}
{{- fail "serviceAccount.name default is there in every namespace and cannot be created: set serviceAccount.create to false, or another name" -}}
{{- end -}}
{{- end }}

{{- define "quire.checkReplicas" -}}
{{- if ne (int .Values.engine.replicas) 1 -}}
{{- fail "engine.replicas must be 1: in this version one router drives one engine, and a second engine would serve nobody; install a second release instead" -}}
{{- end -}}
{{- if ne (int .Values.router.replicas) 1 -}}
{{- fail "router.replicas must be 1: in this version one router drives one engine, and the session of a second router would fence the first one's; install a second release instead" -}}
{{- end -}}
{{- end }}

{{- define "quire.checkGpu" -}}
{{- $count := int .Values.gpu.count -}}
{{- if and (eq .Values.profile "dra") (eq $count 0) -}}
{{- fail "profile dra with gpu.count 0 claims no device: set gpu.count to 1, or take profile cpu" -}}
{{- end -}}
{{- if gt $count 1 -}}
{{- fail (printf "gpu.count must be 0 or 1, not %d: this version runs a model on one device, and the others would lie idle" $count) -}}
{{- end -}}
{{- if and .Values.gpu.selectors (ne .Values.profile "dra") -}}
{{- fail (printf "gpu.selectors belong to the claim of profile dra; profile %s makes none" .Values.profile) -}}
{{- end -}}
{{- end }}

{{- define "quire.checkSingle" -}}
{{- if include "quire.isSingle" . -}}
{{- $untouched := dict "replicas" 1 "cpu" "1" "memoryMiB" 512 "podLabels" dict "podAnnotations" dict "priorityClassName" "" "nodeSelector" dict "tolerations" list "affinity" dict "topologySpreadConstraints" list -}}
{{- if ne (toJson .Values.router) (toJson $untouched) -}}
{{- fail "profile single-container runs the router inside the engine's container, so the values under router have no effect: leave them out; engine and compute describe that container" -}}
{{- end -}}
{{- $memory := dict "cpu" "500m" "leaseTtlSeconds" 10 "maxNumRows" 4096 -}}
{{- if ne (toJson .Values.memory) (toJson $memory) -}}
{{- fail "profile single-container starts the memory service with its own defaults, so the values under memory have no effect: leave them out; engine and compute describe that container" -}}
{{- end -}}
{{- if gt (int64 .Values.scheduling.maxNumSeqs) 4096 -}}
{{- fail (printf "scheduling.maxNumSeqs %d is above 4096, the rows of the memory service in profile single-container, which would refuse the router's session" (int64 .Values.scheduling.maxNumSeqs)) -}}
{{- end -}}
{{- $dns := list (dict "namespaceSelector" (dict "matchLabels" (dict "kubernetes.io/metadata.name" "kube-system"))) (dict "ipBlock" (dict "cidr" "169.254.20.10/32")) -}}
{{- if or (ne (toJson .Values.networkPolicy.allowDnsTo) (toJson $dns)) (ne (toJson .Values.networkPolicy.dnsPorts) "[53]") -}}
{{- fail "networkPolicy.allowDnsTo and networkPolicy.dnsPorts have no effect with profile single-container: its Pod calls nobody, DNS included; leave them out" -}}
{{- end -}}
{{- if .Values.networkPolicy.allowInspectionFrom -}}
{{- fail "networkPolicy.allowInspectionFrom has no effect with profile single-container: its memory service listens on a Unix socket only; look inside with `kubectl exec ... -- quire inspect pool`" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "quire.checkModel" -}}
{{- $model := .Values.model -}}
{{- if and (eq $model.source "pvc") (not $model.claimName) -}}
{{- fail "model.source pvc needs model.claimName, the existing claim that holds the checkpoint" -}}
{{- end -}}
{{- if and (eq $model.source "demo") (or $model.claimName $model.path) -}}
{{- fail "model.claimName and model.path belong to model.source pvc; source demo serves the checkpoint inside the image" -}}
{{- end -}}
{{- if and (eq $model.source "demo") (gt (int64 $model.maxModelLen) 1024) -}}
{{- fail (printf "model.maxModelLen %d is above the demo model's own limit of 1024" (int64 $model.maxModelLen)) -}}
{{- end -}}
{{- end }}

{{- define "quire.checkScheduling" -}}
{{- if gt (int64 .Values.scheduling.maxNumSeqs) (int64 .Values.memory.maxNumRows) -}}
{{- fail (printf "scheduling.maxNumSeqs %d is above memory.maxNumRows %d: the memory service would refuse the router's session" (int64 .Values.scheduling.maxNumSeqs) (int64 .Values.memory.maxNumRows)) -}}
{{- end -}}
{{- end }}

{{- define "quire.checkTenants" -}}
{{- if and .Values.tenants.secretName .Values.tenants.metadataKey -}}
{{- fail "tenants.secretName and tenants.metadataKey are two answers to one question, who calls: set only one of them" -}}
{{- end -}}
{{- end }}

{{- define "quire.checkMetrics" -}}
{{- if and .Values.metrics.podMonitor.enabled (not .Values.metrics.enabled) -}}
{{- fail "metrics.podMonitor.enabled scrapes what metrics.enabled false turns off" -}}
{{- end -}}
{{- if and .Values.metrics.dashboard.enabled (not (.Files.Get "dashboards/quire.json")) -}}
{{- fail "metrics.dashboard.enabled needs dashboards/quire.json in the chart, and it is not there" -}}
{{- end -}}
{{- end }}
