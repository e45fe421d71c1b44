{{/* The model's folder; a download has one of its own for each source, so that a change never
     touches what running pods read. */}}
{{- define "chiasm.modelPath" -}}
{{- $model := .Values.model -}}
{{- if eq $model.download.source "none" -}}
{{- printf "/models/%s" $model.path -}}
{{- else -}}
{{- printf "/models/%s-%s" $model.path (include "chiasm.modelKey" .) -}}
{{- end -}}
{{- end -}}

{{- define "chiasm.modelKey" -}}
{{- $download := .Values.model.download -}}
{{- $huggingface := printf "%s@%s" $download.huggingface.repository $download.huggingface.revision -}}
{{- $parts := list $download.source $huggingface $download.archive.url $download.command $download.checksums -}}
{{- join "\n" $parts | sha256sum | trunc 8 -}}
{{- end -}}

{{- define "chiasm.modelVolume" -}}
{{- $volume := .Values.model.volume -}}
- name: models
{{- if eq $volume.type "emptyDir" }}
  emptyDir: {sizeLimit: {{ $volume.sizeLimit }}}
{{- else }}
  persistentVolumeClaim:
    claimName: {{ eq $volume.type "pvc" | ternary (printf "%s-models" (include "chiasm.fullname" .)) $volume.existingClaim }}
    {{- if eq .Values.model.download.source "none" }}
    # So that also a claim of ReadOnlyMany, on many nodes, can be mounted.
    readOnly: true
    {{- end }}
{{- end }}
{{- end -}}

{{/* The init container that fills the volume: root, component, spec. */}}
{{- define "chiasm.download" -}}
{{- $download := .root.Values.model.download -}}
{{- $volume := .root.Values.model.volume -}}
{{- $isOwn := eq $volume.type "emptyDir" -}}
{{- $isWeightless := and $isOwn (eq .component "gateway") (eq $download.source "huggingface") -}}
{{- $resources := deepCopy $download.resources -}}
{{- if and $isOwn (not $isWeightless) -}}
{{- $resources = merge $resources (dict "requests" (dict "ephemeral-storage" $volume.sizeLimit)) -}}
{{- end -}}
- name: fetch-model
  image: {{ include "chiasm.image" (dict "root" .root "image" .spec.values.image) }}
  imagePullPolicy: {{ include "chiasm.pullPolicy" (dict "root" .root "image" .spec.values.image) }}
  command: [sh, /etc/chiasm/fetch/fetch-model.sh]
  env:
    - {name: HOME, value: /tmp}
    - {name: MODEL, value: {{ include "chiasm.modelPath" .root | quote }}}
    - {name: MODEL_SOURCE, value: {{ $download.source }}}
    {{- if eq $download.source "huggingface" }}
    - {name: MODEL_REPOSITORY, value: {{ $download.huggingface.repository | quote }}}
    - {name: MODEL_REVISION, value: {{ $download.huggingface.revision | quote }}}
    {{- if $isWeightless }}
    # A gateway reads configuration and tokenizer only.
    - {name: MODEL_WEIGHTS, value: "no"}
    {{- end }}
    {{- with $download.huggingface.tokenSecret }}
    {{- if .name }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
    {{- end }}
    {{- end }}
    {{- else if eq $download.source "archive" }}
    - {name: MODEL_URL, value: {{ $download.archive.url | quote }}}
    {{- else }}
    - {name: MODEL_COMMAND, value: {{ $download.command | quote }}}
    {{- end }}
    {{- if $download.checksums }}
    - {name: MODEL_CHECKSUMS, value: /etc/chiasm/fetch/checksums}
    {{- end }}
    {{- with $download.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  securityContext: {{- toYaml .root.Values.containerSecurityContext | nindent 4 }}
  {{- with $resources }}
  # The largest request of a pod's init containers counts for as long as the pod is there.
  resources: {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
    - {name: fetch, mountPath: /etc/chiasm/fetch, readOnly: true}
{{- end -}}
