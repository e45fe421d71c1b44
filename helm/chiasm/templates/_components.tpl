{{/*
The services of a release, by the name that ends the names of their objects:
  values     the service's part of the values
  program    subcommand of chiasm
  kind       Deployment or StatefulSet
  port       of gRPC
  model      whether it reads the model's folder
  modality, shards  of expert pools
  role       label llm-d.ai/role
*/}}
{{- define "chiasm.components" -}}
{{- $found := dict -}}
{{- $_ := set $found "gateway" (dict "values" .Values.gateway "program" "gateway" "kind" "Deployment" "port" 8000 "model" true) -}}
{{- $_ := set $found "orchestrator" (dict "values" .Values.orchestrator "program" "orchestrator" "kind" "Deployment" "port" 9000 "model" false) -}}
{{- if .Values.encoder.enabled -}}
{{- $_ := set $found "encoder" (dict "values" .Values.encoder "program" "vision-encoder" "kind" "StatefulSet" "port" 9000 "model" true "role" "encode") -}}
{{- end -}}
{{- $_ := set $found "decoder" (dict "values" .Values.decoder "program" "decoder" "kind" "StatefulSet" "port" 9000 "model" true "role" "both") -}}
{{- range $modality, $pool := .Values.expertPools -}}
{{- if $pool.enabled -}}
{{- $_ := set $found (printf "%s-experts" $modality) (dict "values" $pool "program" "expert-pool" "kind" "StatefulSet" "port" 9000 "model" true "modality" $modality "shards" $pool.shards) -}}
{{- end -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{/* How a component is scaled: none, builtin, hpa or keda-external. */}}
{{- define "chiasm.scaling" -}}
{{- dig "autoscaling" "type" "none" . -}}
{{- end -}}

{{/* The orchestrator's part in scaling: off, builtin (it scales) or external (it tells KEDA). */}}
{{- define "chiasm.orchestratorScaling" -}}
{{- $found := "off" -}}
{{- range $component := include "chiasm.components" . | fromYaml -}}
{{- $type := include "chiasm.scaling" $component.values -}}
{{- if eq $type "builtin" -}}{{- $found = "builtin" -}}{{- end -}}
{{- if eq $type "keda-external" -}}{{- $found = "external" -}}{{- end -}}
{{- end -}}
{{- $found -}}
{{- end -}}

{{/* Fewest and most replicas of a pool, as a list, for the orchestrator. */}}
{{- define "chiasm.bounds" -}}
{{- if eq (include "chiasm.scaling" .) "none" -}}
{{- list .replicas .replicas | toJson -}}
{{- else -}}
{{- list .autoscaling.minReplicas .autoscaling.maxReplicas | toJson -}}
{{- end -}}
{{- end -}}
